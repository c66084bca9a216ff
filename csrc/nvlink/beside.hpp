// What a dispatch with fresh routing brings along with the rows, in one piece of the receiver's memory: the CPU stands between
// the counts and this dispatch's launch, so the sums are done here.
#pragma once

#include <array>
#include <cstdint>

#include "params.hpp"

namespace deepep_train::nvlink {

class Beside {
public:
    static constexpr int kParts = 4;  // scales, indices or rows, weights, source tokens
    using Words = std::array<int64_t, kParts>;

    // `widths`: int32 words of each part for one received token, weights with `by_row` for one row; 0: does not come.
    Beside(const std::array<int, kParts>& widths, bool by_row) : widths_(widths), by_row_(by_row) {}

    // Fixes how much comes: N tokens and M rows. Returns the words to allocate.
    int64_t measure(int64_t tokens, int64_t rows) {
        int64_t all = 0;
        for (int i = 0; i < kParts; ++i) {
            words_[i] = widths_[i] * (i == 2 && by_row_ ? rows : tokens);
            all += rooms()[i];
        }
        return all;
    }

    const Words& words() const { return words_; }

    // What each takes in the piece of memory: whole vectors of 16 bytes.
    Words rooms() const {
        Words rooms;
        for (int i = 0; i < kParts; ++i) rooms[i] = (words_[i] + 3) / 4 * 4;
        return rooms;
    }

    // Into a dispatch whose rows come to `rows`, the rest to `beside`: offsets in the arena. Scales that are to go on from
    // where they come, which are no part, come to `scales`.
    void place(DispatchParams& p, int64_t rows, int64_t row_bytes, int64_t beside, int64_t scales, int64_t scale_bytes) const {
        p.offsets[0] = rows;
        p.sizes[0] = row_bytes;
        const Words rooms = this->rooms();
        for (int i = 0; i < kParts; ++i) {
            p.offsets[i + 1] = words_[i] == 0 ? 0 : beside;
            p.sizes[i + 1] = sizeof(int32_t) * words_[i];
            beside += sizeof(int32_t) * rooms[i];
        }
        if (widths_[0] != 0) return;
        p.offsets[1] = scales;
        p.sizes[1] = scale_bytes;
    }

private:
    std::array<int, kParts> widths_;
    bool by_row_;
    Words words_{};
};

}  // namespace deepep_train::nvlink

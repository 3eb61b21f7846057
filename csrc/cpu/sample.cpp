#include "sample.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace glm4 {

using LoopsOf = SampleLoops (*)();
static const LoopsOf LOOPS[SIMD_COUNT] = GLM4_VARIANTS(sample_loops);

// Below this many columns a thread costs more than it brings.
constexpr int64_t COLUMNS_PER_THREAD = int64_t(1) << 14;

// floor(u * total), below total.
static int64_t target_of(double uniform, int64_t total) {
    const double share = uniform > 0.0 ? std::min(uniform, 1.0) : 0.0;
    return std::min(int64_t(share * double(total)), total - 1);
}

// The first i whose running sum exceeds the target; n if none does.
template <typename Mass>
static int64_t first_beyond(int64_t n, int64_t target, const Mass& mass) {
    int64_t sum = 0, i = 0;
    while (i < n && (sum += mass(i)) <= target) ++i;
    return i;
}

static int32_t kth_largest(std::vector<int32_t> keys, int64_t k) {
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<int32_t>());
    return keys[k - 1];
}

// One row: its scores and what is known of its blocks.
struct Row {
    const Sample& sample;
    const SampleLoops& loops;
    int64_t row;
    const int32_t* maxima;  // [n_blocks]
    const int64_t* masses;  // [n_blocks], where there is no top-k
    int32_t largest;        // key

    int64_t choose() const {
        if (!sample.uniform) return greedy();
        return sample.top_k || sample.share ? among_kept() : among_all();
    }

    int64_t greedy() const {
        const int64_t block = std::find(maxima, maxima + sample.n_blocks(), largest) - maxima;
        int32_t keys[SAMPLE_BLOCK];
        loops.keys(sample, row, block, keys);
        return block * SAMPLE_BLOCK + (std::find(keys, keys + SAMPLE_BLOCK, largest) - keys);
    }

    int64_t among_all() const {
        const int64_t n_blocks = sample.n_blocks();
        const int64_t total = std::accumulate(masses, masses + n_blocks, int64_t(0));
        int64_t target = target_of(sample.uniform[row], total);
        const int64_t block = first_beyond(n_blocks, target, [&](int64_t b) { return masses[b]; });
        for (int64_t b = 0; b < block; ++b) target -= masses[b];

        int32_t keys[SAMPLE_BLOCK];
        int64_t mass[SAMPLE_BLOCK];
        loops.keys(sample, row, block, keys);
        loops.masses(keys, SAMPLE_BLOCK, score_of(largest), sample.scale, mass);
        return block * SAMPLE_BLOCK +
               first_beyond(SAMPLE_BLOCK, target, [&](int64_t i) { return mass[i]; });
    }

    // No token below it is kept.
    int32_t bound() const {
        const int64_t n_blocks = sample.n_blocks();
        if (!sample.top_k) {
            const float score = score_of(largest) - sample.reach + 0.0f;
            int32_t bits;
            memcpy(&bits, &score, sizeof(bits));
            return bits ^ ((bits >> 31) & 0x7fffffff);
        }
        if (sample.top_k > n_blocks) return KEY_OF_MINUS_INF;
        return kth_largest({maxima, maxima + n_blocks}, sample.top_k);
    }

    int64_t among_kept() const {
        const int64_t n_blocks = sample.n_blocks();
        const int32_t lowest = bound();
        const auto is_live = [=](int32_t most) { return most >= lowest; };
        const int64_t n_live = std::count_if(maxima, maxima + n_blocks, is_live);
        std::vector<int32_t> keys(n_live * SAMPLE_BLOCK), columns(keys.size());
        int64_t n = 0;
        for (int64_t b = 0; b < n_blocks; ++b) {
            if (!is_live(maxima[b])) continue;
            int32_t found[SAMPLE_BLOCK];
            loops.keys(sample, row, b, found);
            const int64_t begin = b * SAMPLE_BLOCK;
            const int64_t count = std::min<int64_t>(SAMPLE_BLOCK, sample.n_cols - begin);
            for (int i = 0; i < count; ++i) {  // a branch would be foretold wrongly
                keys[n] = found[i];
                columns[n] = int32_t(begin) + i;
                n += found[i] >= lowest;
            }
        }
        keys.resize(n);
        const int32_t least = sample.top_k ? kth_largest(keys, sample.top_k) : lowest;

        const int64_t padded = (n + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK * SAMPLE_BLOCK;
        keys.resize(padded, KEY_OF_MINUS_INF);
        std::vector<int64_t> mass(padded);
        loops.masses(keys.data(), padded, score_of(largest), sample.scale, mass.data());
        int64_t total = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (keys[i] < least) mass[i] = 0;
            total += mass[i];
        }
        if (sample.share) {
            const int64_t all =
                masses ? std::accumulate(masses, masses + n_blocks, int64_t(0)) : total;
            total -= drop(keys, mass, n, all, total);
        }
        const int64_t target = target_of(sample.uniform[row], total);
        const int64_t at = first_beyond(n, target, [&](int64_t i) { return mass[i]; });
        return columns[std::min(at, n - 1)];
    }

    // Takes the mass of what top-p drops from candidates that weigh `total` of `all`; how much.
    int64_t drop(const std::vector<int32_t>& keys, std::vector<int64_t>& mass, int64_t n,
                 int64_t all, int64_t total) const {
        constexpr int BITS = 30;
        const int64_t high = all >> BITS, low = all & ((int64_t(1) << BITS) - 1);
        const int64_t most_dropped = high * sample.share + ((low * sample.share) >> BITS);

        // The least key above which candidates weigh less than what must stay.
        struct Item {
            int32_t key;
            int64_t mass;
        };
        std::vector<Item> items;
        items.reserve(n);
        for (int64_t i = 0; i < n; ++i) {
            if (mass[i]) items.push_back({keys[i], mass[i]});
        }
        int64_t from = largest, to = largest, above = 0;
        for (const Item& item : items) from = std::min<int64_t>(from, item.key);
        auto begin = items.begin(), end = items.end();
        while (from < to) {
            const int64_t middle = from + (to - from) / 2;
            auto split = begin;
            int64_t weight = above;
            for (auto item = begin; item < end; ++item) {  // no branch here either
                const bool upper = item->key > middle;
                weight += upper ? item->mass : 0;
                std::swap(*item, *split);
                split += upper;
            }
            if (weight < all - most_dropped) {
                to = middle;
                above = weight;
                begin = split;
            } else {
                from = middle + 1;
                end = split;
            }
        }

        const int32_t least = int32_t(from);
        int64_t kept = 0, ties = 0, tie_mass = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (keys[i] > least) kept += mass[i];
            if (keys[i] == least) ++ties, tie_mass = mass[i];
        }
        const int64_t below = all - kept - ties * tie_mass;
        int64_t n_dropped = (most_dropped - below) / std::max<int64_t>(tie_mass, 1);
        n_dropped = std::max<int64_t>(std::min(n_dropped, ties - 1), 0);
        for (int64_t i = 0, tie = 0; i < n; ++i) {
            if (keys[i] < least || (keys[i] == least && tie++ < n_dropped)) mass[i] = 0;
        }
        return total - kept - (ties - n_dropped) * tie_mass;
    }
};

void sample_cpu(Buffer chosen, Buffer logits, Buffer uniform, Buffer seen, int dtype,
                int64_t n_rows, int64_t n_cols, int64_t stride, int64_t stride_seen, float penalty,
                float scale, int64_t top_k, float reach, int64_t share, int n_threads,
                const std::string& variant) {
    const Checks checks{"sample"};
    const DType type = checks.dtype(dtype);
    checks.size("n_rows", n_rows);
    checks.require(n_cols >= 1 && n_cols <= int64_t(1) << 18, "impossible n_cols");
    checks.require(top_k >= 0 && top_k < n_cols, "top_k must be less than n_cols");
    checks.require(share >= 0 && share <= int64_t(1) << 30, "share must be at most 2^30");
    checks.room<1>("chosen", chosen, {n_rows}, {1}, 8);
    checks.room<2>("logits", logits, {n_rows, n_cols}, {stride, 1}, size_of(type));
    if (uniform.first) checks.room<1>("uniform", uniform, {n_rows}, {1}, 8);
    if (seen.first) checks.room<2>("seen", seen, {n_rows, n_cols}, {stride_seen, 1}, 1);
    const SampleLoops loops = LOOPS[simd_named(variant)]();

    const Sample sample = {reinterpret_cast<const char*>(logits.first),
                           type,
                           n_rows,
                           n_cols,
                           stride,
                           reinterpret_cast<uint8_t*>(seen.first),
                           stride_seen,
                           penalty,
                           reinterpret_cast<const double*>(uniform.first),
                           scale,
                           top_k,
                           reach,
                           share};
    const int64_t n_blocks = sample.n_blocks();
    const int64_t worth = n_rows * n_cols / COLUMNS_PER_THREAD;
    const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
    std::vector<int32_t> maxima(n_rows * n_blocks), largest(n_rows);
    for_each_share(n_shares, n_rows * n_blocks, [&](int, int64_t begin, int64_t end) {
        loops.maxima(sample, begin, end, maxima.data());
    });
    for (int64_t row = 0; row < n_rows; ++row) {
        const auto begin = maxima.begin() + row * n_blocks;
        largest[row] = *std::max_element(begin, begin + n_blocks);
    }
    const auto valid = [&](int64_t row) {
        return largest[row] > KEY_OF_MINUS_INF && largest[row] < KEY_OF_INF;
    };

    std::vector<int64_t> masses;
    if (sample.uniform && !top_k) {
        masses.resize(n_rows * n_blocks);
        for_each_share(n_shares, n_rows * n_blocks, [&](int, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t row = i / n_blocks;
                if (!valid(row)) continue;
                int32_t keys[SAMPLE_BLOCK];
                int64_t mass[SAMPLE_BLOCK];
                loops.keys(sample, row, i % n_blocks, keys);
                loops.masses(keys, SAMPLE_BLOCK, score_of(largest[row]), scale, mass);
                for (const int64_t m : mass) masses[i] += m;
            }
        });
    }

    int64_t* tokens = reinterpret_cast<int64_t*>(chosen.first);
    const int n_row_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_shares, n_rows)));
    std::vector<std::exception_ptr> failed(n_row_shares);
    for_each_share(n_row_shares, n_rows, [&](int share_of_rows, int64_t begin, int64_t end) {
        try {
            for (int64_t row = begin; row < end; ++row) {
                tokens[row] = -1;
                if (!valid(row)) continue;
                const int64_t first = row * n_blocks;
                const int64_t* row_masses = masses.empty() ? nullptr : masses.data() + first;
                const Row one = {sample,     loops,       row, maxima.data() + first,
                                 row_masses, largest[row]};
                tokens[row] = one.choose();
                if (sample.seen) sample.seen[row * stride_seen + tokens[row]] = 1;
            }
        } catch (...) {  // no memory: a thread of torch's team must not throw
            failed[share_of_rows] = std::current_exception();
        }
    });
    for (const std::exception_ptr& failure : failed) {
        if (failure) std::rethrow_exception(failure);
    }
}

}  // namespace glm4

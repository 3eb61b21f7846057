// for_each_share, for_each_block: loops over the threads of a call, on torch's own OpenMP team.
//
// Not OpenMP of our own: a second team's threads would spin beside torch's while those work, which
// halves the speed on few cores. Where torch has no OpenMP, and in a forked child (whose team died
// with the fork), threads are started for the call and joined: some 30 us each.
#pragma once

#include <atomic>
#include <cstdint>

namespace glm4 {

// Runs member(context) on up to n_threads threads at once, the caller's among them, and returns
// when all are done. `member` must not throw.
void run_team(int n_threads, void (*member)(void* context), void* context);

// Calls run(share, begin, end) with 0..count cut into n_shares contiguous ranges, a thread each.
template <typename Run>
void for_each_share(int n_shares, int64_t count, const Run& run) {
    struct Context {
        const Run& run;
        int64_t count;
        int n_shares;
        std::atomic<int> next{0};
    } context{run, count, n_shares};
    run_team(
        n_shares,
        [](void* pointer) {  // the team may be smaller than asked for: shares are claimed
            Context& c = *static_cast<Context*>(pointer);
            for (int share; (share = c.next.fetch_add(1)) < c.n_shares;) {
                c.run(share, c.count * share / c.n_shares, c.count * (share + 1) / c.n_shares);
            }
        },
        &context);
}

// Calls run(block) for 0..n_blocks, each block on whichever thread is free. A thread takes a
// stretch of blocks at a time, in ascending order: long ones first, single ones at the end, so that
// it mostly goes on where it was and all threads end together.
template <typename Run>
void for_each_block(int n_threads, int64_t n_blocks, const Run& run) {
    struct Context {
        const Run& run;
        int64_t n_blocks, n_threads;
        std::atomic<int64_t> next{0};
    } context{run, n_blocks, n_threads};
    run_team(
        n_threads,
        [](void* pointer) {
            Context& c = *static_cast<Context*>(pointer);
            int64_t begin = c.next, end = 0;
            while (begin < c.n_blocks) {
                end = begin + 1 + (c.n_blocks - begin - 1) / (2 * c.n_threads);
                if (!c.next.compare_exchange_weak(begin, end)) continue;
                for (; begin < end; ++begin) c.run(begin);
                begin = c.next;
            }
        },
        &context);
}

}  // namespace glm4

// for_each_share: one loop over a few threads, with no state between calls.
//
// Threads are started for the call and joined before it returns. That costs some 30 us a thread
// (median of start and join on a 2-core EPYC), little beside the milliseconds a large matmul takes,
// and buys what a pool would have to earn: nothing spins beside torch's own threads, a forked child
// works, callers do not meet.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace glm4 {

// Calls run(share, begin, end) with 0..count cut into n_shares contiguous ranges. `run` must not
// throw.
template <typename Run>
void for_each_share(int n_shares, int64_t count, const Run& run) {
    const auto start_of = [&](int share) { return count * share / n_shares; };
    std::vector<std::thread> threads;
    threads.reserve(n_shares);
    int share = 0;
    try {
        for (; share + 1 < n_shares; ++share) {
            threads.emplace_back(run, share, start_of(share), start_of(share + 1));
        }
    } catch (const std::system_error&) {
        // The system gives no more threads: the caller's own does the rest.
    }
    for (; share < n_shares; ++share) run(share, start_of(share), start_of(share + 1));
    for (std::thread& thread : threads) thread.join();
}

}  // namespace glm4

#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <system_error>
#include <thread>
#include <vector>

namespace glm4 {

// libgomp's entry to a parallel region, which libiomp and libomp export as well.
using Parallel = void (*)(void (*member)(void*), void* context, unsigned n_threads, unsigned flags);

static std::atomic<bool> forked{false};

// Looked up through libtorch_cpu, since a process may hold more than one OpenMP library.
static Parallel find_parallel() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch ? dlsym(torch, "GOMP_parallel") : nullptr;
    return reinterpret_cast<Parallel>(symbol);
}

void run_team(int n_threads, void (*member)(void* context), void* context) {
    if (n_threads <= 1) return member(context);
    static const Parallel parallel = find_parallel();
    if (parallel && !forked) return parallel(member, context, unsigned(n_threads), 0);

    std::vector<std::thread> threads;
    threads.reserve(n_threads);
    try {
        while (int(threads.size()) + 1 < n_threads) threads.emplace_back(member, context);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that run claim the rest of the work.
    }
    member(context);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace glm4

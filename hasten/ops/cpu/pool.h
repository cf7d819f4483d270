// Threads that help the one that calls, for as long as there is work.
//
// The work hands itself out in pieces (an atomic counter), so whoever is running takes the next one, and the caller waits
// for pieces that were begun, never for a thread that has not come: on a machine with other work a helper may be away
// for milliseconds, and a barrier would cost a token that at each of its fifty products.

#include <atomic>
#include <pthread.h>
#include <sched.h>

namespace {

inline void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

constexpr int SPINS = 5000;  // some tens of microseconds, about what Python needs between two products

struct Pool {
    std::atomic<void (*)(void *)> work{nullptr};
    std::atomic<void *> arguments{nullptr};
    std::atomic<unsigned> turn{0};
    std::atomic<int> inside{0}, sleeping{0}, wanted{0}, threads{0}, born{0};
    std::atomic<bool> taken{false};
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
};

Pool first_pool;
Pool *pool = &first_pool;

void *help(void *of) {
    Pool &p = *static_cast<Pool *>(of);
    const int number = p.born.fetch_add(1);
    for (unsigned seen = 0;;) {
        for (int i = 0; i < SPINS && p.turn.load() == seen; i++) breathe();
        if (p.turn.load() == seen) {
            pthread_mutex_lock(&p.lock);
            p.sleeping++;
            while (p.turn.load() == seen) pthread_cond_wait(&p.wake, &p.lock);
            p.sleeping--;
            pthread_mutex_unlock(&p.lock);
        }
        seen = p.turn.load();
        p.inside++;  // before looking for work: the caller takes the work away, then waits until nobody is inside
        if (void (*work)(void *) = p.work.load())
            if (number < p.wanted.load()) work(p.arguments.load());
        p.inside--;
    }
    return nullptr;
}

// A forked child has none of the helpers, and whoever called them is not there to let them go: it works alone.
void forget() { pool = nullptr; }

// `work` by the calling thread and up to threads - 1 others; alone while another caller has them.
void share(int threads, void (*work)(void *), void *arguments) {
    if (threads < 2 || !pool || pool->taken.exchange(true)) return work(arguments);
    Pool &p = *pool;
    while (p.threads.load() < threads - 1) {
        pthread_t made;
        if (pthread_create(&made, nullptr, help, &p)) break;
        pthread_detach(made);
        if (p.threads++ == 0) pthread_atfork(nullptr, nullptr, forget);
    }
    p.arguments = arguments, p.wanted = threads - 1, p.work = work;
    p.turn++;
    if (p.sleeping.load()) {
        pthread_mutex_lock(&p.lock);
        pthread_cond_broadcast(&p.wake);
        pthread_mutex_unlock(&p.lock);
    }
    work(arguments);
    p.work = nullptr;
    for (int i = 0; p.inside.load(); i++) i < 100 ? breathe() : void(sched_yield());
    p.taken = false;
}

}  // namespace

#include "team.h"

#include <omp.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace medjax {
namespace {

std::atomic<int> g_threads{1};

struct Job {
  const std::function<void()>* run;
  std::exception_ptr error;
  std::condition_variable finished;
  bool done = false;
};

class Team {
 public:
  // Never destroyed: handlers may still be called while the process ends.
  static Team& Get() {
    static Team* const team = new Team;
    return *team;
  }

  void Run(const std::function<void()>& run) {
    Job job;
    job.run = &run;
    std::unique_lock<std::mutex> lock(mutex_);
    queue_.push_back(&job);
    arrived_.notify_one();
    job.finished.wait(lock, [&] { return job.done; });
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  Team() { std::thread([this] { Loop(); }).detach(); }

  // One thread a CPU, where the team has as many threads as the process may use CPUs. Otherwise, on a busy host, a
  // thread woken for a short job is put on the CPU of the one that wakes it, and the two take turns. A smaller team
  // stays free: other processes may have teams on the same CPUs.
  static void Pin() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != g_threads) return;
    std::vector<int> cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
    }
#pragma omp parallel
    {
      cpu_set_t own;
      CPU_ZERO(&own);
      CPU_SET(cpus[omp_get_thread_num() % cpus.size()], &own);
      sched_setaffinity(0, sizeof own, &own);
    }
  }

  [[noreturn]] void Loop() {
    omp_set_dynamic(0);
    omp_set_num_threads(g_threads);
    Pin();
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      arrived_.wait(lock, [&] { return !queue_.empty(); });
      Job* job = queue_.front();
      queue_.pop_front();
      lock.unlock();
      try {
        (*job->run)();
      } catch (...) {
        job->error = std::current_exception();
      }
      lock.lock();
      job->done = true;
      // Under the lock: `job` lives on the stack of a caller that returns as soon as it sees `done`.
      job->finished.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Job*> queue_;
};

}  // namespace

void SetThreads(int threads) { g_threads = threads < 1 ? 1 : threads; }

int Threads() { return g_threads; }

void RunOnTeam(const std::function<void()>& job) { Team::Get().Run(job); }

void* Scratch(std::size_t bytes) {
  static void* memory = nullptr;  // touched by the team's thread only
  static std::size_t capacity = 0;
  if (bytes <= capacity) return memory;
  constexpr std::size_t kHugePage = std::size_t{1} << 21;
  const std::size_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (memory != nullptr) munmap(memory, capacity);
  memory = nullptr;
  capacity = 0;
  void* fresh = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fresh == MAP_FAILED) throw std::bad_alloc();
  madvise(fresh, wanted, MADV_HUGEPAGE);  // a refusal only costs speed
  memory = fresh;
  capacity = wanted;
  return memory;
}

}  // namespace medjax

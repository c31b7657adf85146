// One thread that owns the OpenMP team, and the scratch memory its jobs share.
#ifndef MEDJAX_TEAM_H_
#define MEDJAX_TEAM_H_

#include <cstddef>
#include <functional>

namespace medjax {

// Number of threads of the team. Has an effect before the first job only.
void SetThreads(int threads);
int Threads();

// Runs `job` on the team's thread and waits for it. Exceptions of the job are thrown here.
//
// XLA calls its handlers from any thread of its pool, several at a time. An OpenMP region opened by each of them would
// give each its own team: more threads than CPUs at once, and on a large machine thousands asleep. So the jobs of all
// callers (and of all devices of the process) queue for one team, which has every CPU while the callers sleep.
void RunOnTeam(const std::function<void()>& job);

// Scratch memory of the running job: at least `bytes`, aligned to a page, contents undefined, valid until the job ends.
// Only to be called once per job. The memory stays with the process: the next job finds it mapped and warm.
void* Scratch(std::size_t bytes);

}  // namespace medjax

#endif  // MEDJAX_TEAM_H_

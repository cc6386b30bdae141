// The processor's own ceilings: fused multiply-adds in registers, and copies through memory.
// Compiled on the machine that it measures, for that machine.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kChains = 24;  // more than latency x units, fewer than registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kChains = 12;
#else
constexpr int kLanes = 4;
constexpr int kChains = 12;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

/// `rounds` multiply-adds on each of kChains independent vectors; returns what keeps them alive.
__attribute__((noinline)) float multiply_adds(int64_t rounds, float factor) {
  Vector chain[kChains], a = factor - Vector{}, b = 1e-7f - Vector{};
  for (int i = 0; i < kChains; ++i) chain[i] = static_cast<float>(i) - Vector{};
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * a + b;
  }
  float sum = 0.0f;
  for (int i = 0; i < kChains; ++i) sum += chain[i][0];
  return sum;
}

/// Seconds of the slowest of `threads` that do the same work at the same time; the best of `tries`.
template <class Work>
double best_seconds(int threads, int tries, Work work) {
  double best = 1e30;
  for (int t = 0; t < tries; ++t) {
    std::barrier start(threads);
    std::vector<double> seconds(threads);
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i)
      pool.emplace_back([&, i] {
        start.arrive_and_wait();
        const auto begin = Clock::now();
        work(i);
        seconds[i] = std::chrono::duration<double>(Clock::now() - begin).count();
      });
    for (auto& thread : pool) thread.join();
    best = std::min(best, *std::max_element(seconds.begin(), seconds.end()));
  }
  return best;
}

}  // namespace

/// fp32 GFLOP/s of independent fused multiply-adds in registers, all threads together.
extern "C" double fma_gflops(int threads) {
  constexpr int64_t kRounds = 4'000'000;
  std::vector<float> kept(threads);
  const double seconds = best_seconds(
      threads, 3, [&](int i) { kept[i] = multiply_adds(kRounds, 0.999f + 1e-9f * i); });
  volatile float sink = kept[0];
  (void)sink;
  return 2.0 * kRounds * kChains * kLanes * threads / seconds / 1e9;
}

/// GB/s read and written by one copy of `bytes`, all threads together.
extern "C" double copy_gbs(int threads, int64_t bytes) {
  const auto from = std::make_unique<char[]>(bytes), to = std::make_unique<char[]>(bytes);
  std::memset(from.get(), 1, bytes);
  std::memset(to.get(), 2, bytes);
  const int64_t share = bytes / threads;
  const double seconds = best_seconds(
      threads, 5, [&](int i) { std::memcpy(to.get() + i * share, from.get() + i * share, share); });
  return 2.0 * static_cast<double>(share) * threads / seconds / 1e9;
}

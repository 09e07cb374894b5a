#include "integrations/torch/csrc/freed_memory.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace thinwire {
namespace {

constexpr std::size_t kBlock = std::size_t{20} << 20U;
constexpr int kBlocks = 6;
constexpr int kSteps = 5;

// Pages that steps take from the system which allocate, fill and free such blocks.
long faults_of_steps() {
  const auto faults = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
  };
  long before = 0;
  for (int step = 0; step <= kSteps; ++step) {
    if (step == 1) before = faults();  // the first takes them anyway
    std::vector<void*> blocks;
    for (int i = 0; i < kBlocks; ++i) {
      blocks.push_back(std::malloc(kBlock));
      std::memset(blocks.back(), 1, kBlock);
    }
    for (void* block : blocks) std::free(block);
  }
  return faults() - before;
}

// With huge pages a fault takes 2 MiB.
constexpr long kFewest = kSteps * static_cast<long>(kBlocks * kBlock >> 21U);

TEST(FreedMemory, IsTakenAgainInsteadOfGivenBack) {
  ASSERT_GE(faults_of_steps(), kFewest) << "glibc keeps it by itself: this tests nothing";
  ::setenv("MALLOC_TOP_PAD_", "1000", 1);
  keep_freed_memory(kBlocks * kBlock, kBlock);
  EXPECT_GE(faults_of_steps(), kFewest) << "the user's thresholds were changed";
  ::unsetenv("MALLOC_TOP_PAD_");
  keep_freed_memory(kBlocks * kBlock, kBlock);
  EXPECT_LT(faults_of_steps(), kFewest / 5);
}

}  // namespace
}  // namespace thinwire

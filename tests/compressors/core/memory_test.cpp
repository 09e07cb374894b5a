#include "compressors/core/memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "compressors/core/error.h"
#include "compressors/core/huge_pages.h"

namespace thinwire {
namespace {

using testing::Each;
using testing::ElementsAre;

void write(Memory& memory, std::vector<float> values) {
  std::copy(values.begin(), values.end(), memory.next().begin());
}

TEST(Memory, ReadsAsZerosBeforeTheFirstCommit) {
  for (const bool transactional : {true, false}) {
    Memory memory(1000, {.transactional = transactional});
    EXPECT_THAT(memory.current(), Each(0.0F));
    EXPECT_FALSE(memory.written());
    EXPECT_EQ(memory.bytes(), transactional ? 8000U : 4000U);
  }
}

TEST(Memory, CommitMakesTheWrittenGenerationCurrent) {
  Memory memory(3);
  write(memory, {1, 2, 3});
  EXPECT_TRUE(memory.written());
  EXPECT_THAT(memory.current(), Each(0.0F));
  memory.commit();
  EXPECT_FALSE(memory.written());
  EXPECT_THAT(memory.current(), ElementsAre(1, 2, 3));
  memory.commit();  // nothing written: nothing changes
  EXPECT_THAT(memory.current(), ElementsAre(1, 2, 3));
}

TEST(Memory, RollbackReturnsToTheStateBeforeBitForBit) {
  Memory memory(4);
  const std::vector<float> before = {-0.0F, std::numeric_limits<float>::denorm_min(), 1.5F, -3};
  memory.restore(before);
  for (int step = 0; step < 3; ++step) {
    write(memory, {9, 9, 9, 9});
    memory.rollback();
    ASSERT_EQ(std::memcmp(memory.current().data(), before.data(), 16), 0);
  }
  write(memory, {5, 6, 7, 8});
  memory.commit();
  EXPECT_THAT(memory.current(), ElementsAre(5, 6, 7, 8));
}

TEST(Memory, VelocityAndStateFollowTheResidual) {
  for (const bool transactional : {true, false}) {
    Memory memory(3, {.transactional = transactional, .needs = {.velocity = true, .state = 2}});
    EXPECT_EQ(memory.bytes(), (transactional ? 2U : 1U) * (3 + 3 + 2) * sizeof(float));
    EXPECT_THAT(memory.velocity(), ElementsAre(0, 0, 0));
    EXPECT_THAT(memory.state(), ElementsAre(0, 0));
    const auto step = [&](float value) {
      write(memory, {value, value, value});
      std::ranges::fill(memory.next_velocity(), value + 1);
      std::ranges::fill(memory.next_state(), value + 2);
    };
    step(1);
    memory.commit();
    EXPECT_THAT(memory.velocity(), Each(2));
    EXPECT_THAT(memory.state(), Each(3));
    if (transactional) {
      step(7);
      memory.rollback();
      EXPECT_THAT(memory.current(), Each(1));
      EXPECT_THAT(memory.velocity(), Each(2));
      EXPECT_THAT(memory.state(), Each(3));
    }
    memory.scale(0.5F);
    EXPECT_THAT(memory.velocity(), Each(1));
    EXPECT_THAT(memory.state(), Each(3)) << "the codec's own: it has no unit that we know";
    memory.restore_velocity(std::vector<float>{4, 5, 6});
    memory.restore_state(std::vector<float>{8, 9});
    EXPECT_THAT(memory.velocity(), ElementsAre(4, 5, 6));
    EXPECT_THAT(memory.state(), ElementsAre(8, 9));
    EXPECT_THROW(memory.restore_velocity(std::vector<float>(2)), InvalidArgument);
    EXPECT_THROW(memory.restore_state(std::vector<float>(3)), InvalidArgument);
    memory.clear();
    EXPECT_THAT(memory.velocity(), Each(0.0F));
    EXPECT_THAT(memory.state(), Each(0.0F));
  }
  EXPECT_TRUE(Memory(3).velocity().empty());
  EXPECT_TRUE(Memory(3).state().empty());
  EXPECT_THROW(Memory(3, {.needs = {.state = -1}}), InvalidArgument);
}

TEST(Memory, OtherStoragesAreWorkedOnInScratch) {
  constexpr std::int64_t kElements = 200;
  constexpr Dither kDither = {.first = 1, .second = 2};
  for (const ResidualStorage storage : {ResidualStorage::kBF16, ResidualStorage::kQ8}) {
    for (const bool transactional : {true, false}) {
      Memory memory(kElements, {.transactional = transactional, .storage = storage});
      EXPECT_EQ(memory.bytes(),
                (transactional ? 2 : 1) * PackedResidual(storage, kElements).bytes());
      EXPECT_THROW((void)memory.current(), InvalidArgument);
      EXPECT_THROW((void)memory.next(), InvalidArgument);
      std::vector<float> read(kElements);
      std::vector<float> scratch(memory.scratch_bytes() / sizeof(float));
      const auto step = [&](float value) {
        memory.unpack(std::as_writable_bytes(std::span(scratch)));
        EXPECT_TRUE(std::ranges::equal(memory.current(), read));
        std::ranges::fill(memory.next(), value);
        memory.pack(kDither);
      };
      step(1.5F);
      memory.commit();
      memory.read(read);
      EXPECT_THAT(read, Each(1.5F));
      if (transactional) {
        step(7);
        memory.rollback();
        memory.read(read);
        EXPECT_THAT(read, Each(1.5F));
      }
      memory.scale(4);
      memory.read(read);
      EXPECT_THAT(read, Each(6));
      memory.unpack(std::as_writable_bytes(std::span(scratch)));
      memory.pack(kDither);  // seen only: nothing changes
      memory.commit();
      std::vector<float> same(kElements);
      memory.read(same);
      EXPECT_EQ(same, read);
      memory.restore(std::vector<float>(kElements, -0.5F));
      memory.read(read);
      EXPECT_THAT(read, Each(-0.5F));
      EXPECT_THROW(memory.restore(std::vector<float>(3)), InvalidArgument);
      EXPECT_THROW(memory.unpack({}), InvalidArgument);
      memory.clear();
      memory.read(read);
      EXPECT_THAT(read, Each(0));
    }
  }
  EXPECT_EQ(Memory(5).scratch_bytes(), 0U);
}

TEST(Memory, BF16IsOpenedWhereItHasTwoGenerations) {
  constexpr Dither kDither = {.first = 3, .second = 4};
  Memory memory(3, {.storage = ResidualStorage::kBF16});
  EXPECT_TRUE(memory.opens());
  EXPECT_FALSE(memory.is_open());
  EXPECT_THROW((void)memory.opened_current(), InvalidArgument);
  EXPECT_THROW((void)memory.opened_next(), InvalidArgument);
  EXPECT_THROW((void)memory.dither(), InvalidArgument);
  memory.restore(std::vector<float>{1, 2, 3});
  memory.open(kDither);
  EXPECT_EQ(memory.dither().second, 4U);
  EXPECT_EQ(to_float(memory.opened_current()[2]), 3);
  EXPECT_FALSE(memory.written());
  std::ranges::fill(memory.opened_next(), to_bf16(5));
  EXPECT_TRUE(memory.written());
  memory.close();
  std::vector<float> read(3);
  memory.rollback();
  memory.read(read);
  EXPECT_THAT(read, ElementsAre(1, 2, 3));
  memory.open(kDither);
  std::ranges::fill(memory.opened_next(), to_bf16(5));
  memory.close();
  memory.commit();
  memory.read(read);
  EXPECT_THAT(read, Each(5));
  std::vector<float> given(3, 9.0F);
  memory.adopt({std::shared_ptr<float>(), given.data()});
  memory.open(kDither);  // forgets it
  std::ranges::fill(memory.opened_next(), to_bf16(6));
  memory.close();
  memory.commit();
  memory.read(read);
  EXPECT_THAT(read, Each(6));
  EXPECT_THROW((void)memory.current(), InvalidArgument);
  for (const MemoryOptions& options :
       {MemoryOptions{}, MemoryOptions{.storage = ResidualStorage::kQ8},
        MemoryOptions{.transactional = false, .storage = ResidualStorage::kBF16}}) {
    Memory other(3, options);
    EXPECT_FALSE(other.opens());
    EXPECT_THROW(other.open(kDither), InvalidArgument);
  }
}

TEST(Memory, IsSeenAsItIsStored) {
  const std::vector<float> values = {1, -2, 3};
  for (const ResidualStorage storage : {ResidualStorage::kFP32, ResidualStorage::kBF16}) {
    Memory memory(3, {.storage = storage});
    memory.restore(values);
    const TensorView seen = memory.as_stored().value();
    EXPECT_EQ(seen.elements, 3);
    if (storage == ResidualStorage::kFP32) {
      ASSERT_EQ(seen.dtype, DType::kF32);
      EXPECT_EQ(static_cast<const float*>(seen.data)[1], -2);
    } else {
      ASSERT_EQ(seen.dtype, DType::kBF16);
      EXPECT_EQ(to_float(static_cast<const BF16*>(seen.data)[1]), -2);
    }
  }
  EXPECT_FALSE(Memory(3, {.storage = ResidualStorage::kQ8}).as_stored().has_value());
}

TEST(HugePages, AreZeroedAndAligned) {
  EXPECT_EQ(allocate_pages(0), nullptr);
  for (const std::size_t bytes : {1UL, 64UL, 1000UL, 2UL << 20, (4UL << 20) + 1}) {
    const Pages pages = allocate_pages(bytes);
    const std::size_t alignment = bytes < 2UL << 20 ? 64 : 2UL << 20;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pages.get()) % alignment, 0U) << bytes;
    EXPECT_THAT(std::span(pages.get(), bytes), Each(std::byte{0})) << bytes;
  }
}

TEST(Memory, OneGenerationIsWrittenInPlaceAndCannotRollBack) {
  Memory memory(2, {.transactional = false});
  memory.restore(std::vector<float>{1, 2});
  memory.rollback();  // nothing written yet
  EXPECT_EQ(memory.next().data(), memory.current().data());
  EXPECT_THAT(memory.next(), ElementsAre(1, 2));
  EXPECT_THROW(memory.rollback(), InvalidArgument);
  memory.commit();
  EXPECT_NO_THROW(memory.rollback());
}

// Floats that say when they are released.
std::shared_ptr<float> storage(std::vector<float>& values, bool& released) {
  released = false;
  return {values.data(), [&released](float*) { released = true; }};
}

TEST(Memory, AdoptedStorageHoldsTheGenerationUntilTheNextCommit) {
  Memory memory(2);
  std::vector<float> first = {1, 2};
  std::vector<float> second = {3, 4};
  bool first_released = false;
  bool second_released = false;
  memory.adopt(storage(first, first_released));
  EXPECT_EQ(memory.next().data(), first.data());
  EXPECT_THAT(memory.next(), ElementsAre(1, 2));
  memory.commit();
  EXPECT_EQ(memory.current().data(), first.data());
  EXPECT_EQ(memory.bytes(), 8U);
  memory.adopt(storage(second, second_released));
  memory.next()[1] = 5;
  EXPECT_FALSE(first_released);
  memory.commit();
  EXPECT_TRUE(first_released);
  EXPECT_THAT(memory.current(), ElementsAre(3, 5));
  write(memory, {6, 7});  // into memory of its own again
  EXPECT_FALSE(second_released);
  memory.commit();
  EXPECT_TRUE(second_released);
  EXPECT_THAT(memory.current(), ElementsAre(6, 7));
}

TEST(Memory, AdoptedStorageIsReleasedByAStepThatDoesNotKeepIt) {
  Memory memory(2);
  memory.restore(std::vector<float>{1, 2});
  std::vector<float> values = {3, 4};
  bool released = false;
  memory.adopt(storage(values, released));
  memory.next()[0] = 9;
  memory.rollback();
  EXPECT_TRUE(released);
  EXPECT_THAT(memory.current(), ElementsAre(1, 2));
  for (const bool commits : {true, false}) {
    memory.adopt(storage(values, released));  // and not written
    commits ? memory.commit() : memory.rollback();
    EXPECT_TRUE(released);
    EXPECT_THAT(memory.current(), ElementsAre(1, 2));
  }
}

TEST(Memory, AdoptsNothingInsideAStepOrWithOneGeneration) {
  std::vector<float> values(2);
  bool released = false;
  Memory memory(2);
  memory.next();
  EXPECT_THROW(memory.adopt(storage(values, released)), InvalidArgument);
  Memory one(2, {.transactional = false});
  EXPECT_THROW(one.adopt(storage(values, released)), InvalidArgument);
}

TEST(Memory, ScaleRestoreAndClearRefuseAStepInProgress) {
  Memory memory(2);
  memory.restore(std::vector<float>{1, 2});
  memory.scale(0.5F);
  EXPECT_THAT(memory.current(), ElementsAre(0.5F, 1.0F));
  memory.next();
  EXPECT_THROW(memory.scale(2), InvalidArgument);
  EXPECT_THROW(memory.clear(), InvalidArgument);
  EXPECT_THROW(memory.restore(std::vector<float>{1, 2}), InvalidArgument);
  memory.rollback();
  EXPECT_THROW(memory.restore(std::vector<float>{1}), InvalidArgument);
  memory.clear();
  EXPECT_THAT(memory.current(), Each(0.0F));
}

TEST(Memory, IsAlignedAtEverySize) {
  for (const std::int64_t n : {0, 1, 15, 4096, 1 << 20}) {
    Memory memory(n);
    EXPECT_EQ(memory.current().size(), static_cast<std::size_t>(n));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.current().data()) % 64, 0U) << n;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.next().data()) % 64, 0U) << n;
  }
}

TEST(Memory, RefusesNegativeSizesAndWildDecay) {
  EXPECT_THROW(Memory(-1), InvalidArgument);
  for (const float decay : {-0.1F, 1.1F, std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_THROW(Memory(1, {.decay = decay}), InvalidArgument) << decay;
  }
}

}  // namespace
}  // namespace thinwire

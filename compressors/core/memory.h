// Memory: what error feedback keeps for one key, in two generations.
//
// encode reads `current()` and writes `next()`; `commit()` makes the written generation current,
// `rollback()` forgets it, and then everything is bit for bit as before the step. With
// transactional = false both are the same buffer and rollback() throws InvalidArgument once
// something was written. A generation that was never written reads as zeros. One thread at a time
// per Memory; different Memories are independent. Owns its buffers (64-byte aligned, huge-page
// friendly); allocates only in the constructor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "compressors/core/dtype.h"

namespace thinwire {

struct MemoryOptions {
  bool transactional = true;
  // v = gradient + decay * residual. In [0, 1].
  float decay = 1.0F;
};

class Memory {
 public:
  explicit Memory(std::int64_t elements, MemoryOptions options = {});
  ~Memory();
  Memory(Memory&&) noexcept;
  Memory& operator=(Memory&&) noexcept;

  std::int64_t elements() const { return elements_; }
  float decay() const { return options_.decay; }
  bool transactional() const { return options_.transactional; }
  // Bytes held, all generations.
  std::size_t bytes() const;

  // The committed residual, fp32, elements() long.
  std::span<const float> current() const;
  // The generation being written this step; marks the step as written. Contents are unspecified
  // before the codec writes them (transactional) or equal current() (not transactional).
  std::span<float> next();
  // True from next() until commit() or rollback().
  bool written() const { return written_; }

  void commit();
  void rollback();

  // Multiplies the committed residual (loss-scale changes). InvalidArgument while written().
  void scale(float factor);
  // Replaces the committed residual. InvalidArgument on a wrong size or while written().
  void restore(std::span<const float> residual);
  // Sets the committed residual to zero.
  void clear();

 private:
  struct Free {
    void operator()(float* p) const;
  };
  std::int64_t elements_ = 0;
  MemoryOptions options_;
  std::unique_ptr<float[], Free> generations_[2];
  int current_ = 0;
  bool written_ = false;
};

}  // namespace thinwire

// Memory: what error feedback keeps for one key, in two generations.
//
// encode reads `current()` and writes `next()`; `commit()` makes the written generation current,
// `rollback()` forgets it, and then everything is bit for bit as before the step. With
// transactional = false both are the same buffer and rollback() throws InvalidArgument once
// something was written. A generation that was never written reads as zeros. One thread at a time
// per Memory; different Memories are independent.
//
// Its buffers are its own (64-byte aligned, huge-page friendly, allocated by the constructor) or
// adopted: memory that its user gives away, such as the gradient itself, whose lines lie in the
// cache when the residual is written. Adopted memory is kept while it holds a generation, then
// released. From the first adopted generation on there is no second buffer; next() allocates one
// if it is needed again.
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
  ~Memory() = default;
  Memory(Memory&&) noexcept = default;
  Memory& operator=(Memory&&) noexcept = default;

  std::int64_t elements() const { return elements_; }
  float decay() const { return options_.decay; }
  bool transactional() const { return options_.transactional; }
  // Bytes held now, all generations.
  std::size_t bytes() const;

  // The committed residual, fp32, elements() long.
  std::span<const float> current() const;
  // Lets this step's generation be written to `storage`, elements() floats, which nobody else uses
  // until it is released: at the next commit() that does not keep it, or at rollback(). Its
  // contents stay as they are until the codec writes there. InvalidArgument when written() or not
  // transactional.
  void adopt(std::shared_ptr<float> storage);
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
  struct Generation {
    std::shared_ptr<float> data;
    bool adopted = false;
  };
  std::size_t size() const { return static_cast<std::size_t>(elements_); }

  std::int64_t elements_ = 0;
  MemoryOptions options_;
  Generation current_;
  Generation next_;
  bool written_ = false;
};

}  // namespace thinwire

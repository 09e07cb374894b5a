// Memory: what error feedback keeps for one key, in two generations: the residual, and what else
// its codec needs from step to step: a velocity, a small state of its own.
//
// encode reads `current()` and writes `next()`, or, of a memory that is open, what lies behind
// them; `commit()` makes the written generation current, `rollback()` forgets it, and then
// everything is bit for bit as before the step. With transactional = false both are the same buffer
// and rollback() throws InvalidArgument once something was written. A generation that was never
// written reads as zeros. One thread at a time per Memory; different Memories are independent.
//
// Its buffers are its own (64-byte aligned, huge-page friendly, allocated by the constructor); the
// residual's may also be adopted: memory that its user gives away, such as the gradient itself,
// whose lines lie in the cache when the residual is written. Adopted memory is kept while it holds
// a generation, then released. From the first adopted generation on there is no second buffer;
// next() allocates one if it is needed again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "compressors/core/convert.h"
#include "compressors/core/dtype.h"
#include "compressors/core/packed_residual.h"
#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

// What a codec keeps beside the residual. A codec that calls next() writes every part it asked for.
struct MemoryNeeds {
  bool velocity = false;   // one float an element, for momentum correction
  std::int64_t state = 0;  // floats of the codec's own: factors, thresholds
};

struct MemoryOptions {
  bool transactional = true;
  ResidualStorage storage = ResidualStorage::kFP32;
  // v = gradient + decay * residual. In [0, 1].
  float decay = 1.0F;
  MemoryNeeds needs = {};
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

  // The committed residual, fp32, elements() long. Where it is stored in another way, it can be
  // seen, and next() written, between unpack() and pack() only; read() copies it at any time.
  std::span<const float> current() const;
  void read(std::span<float> residual) const;
  // It where it lies, to be read only: fp32 or bf16; none of another storage.
  std::optional<TensorView> as_stored() const;
  // Lets this step's generation be written to `storage`, elements() floats, which nobody else uses
  // until it is released: at the next commit() that does not keep it, or at rollback(). Its
  // contents stay as they are until the codec writes there. InvalidArgument when written() or not
  // transactional.
  void adopt(std::shared_ptr<float> storage);
  // A residual that is not stored as fp32 is worked on in scratch: unpack() before a codec sees the
  // memory, pack() after. `scratch`: scratch_bytes() long, aligned to 64, the memory's own until
  // pack(). `dither` rounds what the codec wrote; the same on every SIMD target. Both do nothing
  // for kFP32.
  std::size_t scratch_bytes() const;
  void unpack(std::span<std::byte> scratch);
  void pack(const Dither& dither);
  // A codec whose traits say opened_residual takes two generations of kBF16 as they are instead:
  // open() before, which forgets what was adopted, close() after; velocity and state as ever. It
  // reads opened_current() and writes opened_next(), which marks the step as written, each element
  // rounded by dithered_bf16(x, dither_bits(dither(), element)): what pack() would have written.
  bool opens() const;
  void open(const Dither& dither);
  bool is_open() const { return dither_.has_value(); }
  std::span<const BF16> opened_current() const;
  std::span<BF16> opened_next();
  const Dither& dither() const;
  void close() { dither_.reset(); }
  // The generation being written this step; marks the step as written. Contents are unspecified
  // before the codec writes them (transactional) or equal current() (not transactional).
  std::span<float> next();
  // The same two generations of the parts that MemoryNeeds names; empty spans where it does not.
  // The next ones belong to the step that next() marks.
  std::span<const float> velocity() const { return velocity_of(current_extra_.get()); }
  std::span<float> next_velocity() { return velocity_of(next_extra()); }
  std::span<const float> state() const { return state_of(current_extra_.get()); }
  std::span<float> next_state() { return state_of(next_extra()); }
  // True from next() until commit() or rollback().
  bool written() const { return written_; }

  void commit();
  void rollback();

  // Multiplies the committed residual and velocity (loss-scale changes). InvalidArgument while
  // written().
  void scale(float factor);
  // Replace a part of the committed generation. InvalidArgument on a wrong size or while written().
  void restore(std::span<const float> residual);
  void restore_velocity(std::span<const float> velocity);
  void restore_state(std::span<const float> state);
  // Sets all of the committed generation to zero.
  void clear();

 private:
  struct Generation {
    std::shared_ptr<float> data;
    bool adopted = false;
  };
  bool packs() const { return options_.storage != ResidualStorage::kFP32; }
  std::size_t size() const { return static_cast<std::size_t>(elements_); }
  std::int64_t extra_elements() const;
  float* next_extra() const {
    return (options_.transactional ? next_extra_ : current_extra_).get();
  }
  // The parts of an extra generation: the velocity, then the state.
  template <typename T>
  std::span<T> velocity_of(T* extra) const {
    return {extra, options_.needs.velocity ? size() : 0};
  }
  template <typename T>
  std::span<T> state_of(T* extra) const {
    const std::size_t n = static_cast<std::size_t>(options_.needs.state);
    return {n == 0 ? extra : extra + velocity_of(extra).size(), n};
  }
  void check_open() const;
  void check_restore(std::size_t got, std::size_t expected, const char* what) const;
  void restore_part(std::span<const float> values, std::span<float> part, const char* what) const;

  std::int64_t elements_ = 0;
  MemoryOptions options_;
  // kFP32: the generations. Else what is unpacked, between unpack() and pack().
  Generation current_;
  Generation next_;
  // Other storages: the generations; transactional: two.
  PackedResidual packed_current_;
  PackedResidual packed_next_;
  std::shared_ptr<float> current_extra_;
  std::shared_ptr<float> next_extra_;
  std::optional<Dither> dither_;  // while it is open
  bool written_ = false;
};

}  // namespace thinwire

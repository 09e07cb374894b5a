#include "compressors/core/memory.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "compressors/core/error.h"
#include "compressors/core/huge_pages.h"

namespace thinwire {
namespace {

constexpr std::size_t kAlignmentBytes = 64;

std::size_t generation_bytes(std::int64_t elements) {
  return static_cast<std::size_t>(elements) * sizeof(float);
}

std::size_t aligned_bytes(std::int64_t elements) {
  return (generation_bytes(elements) + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

std::shared_ptr<float> allocate_generation(std::int64_t elements) {
  const std::shared_ptr<std::byte> pages(allocate_pages(generation_bytes(elements)));
  return {pages, reinterpret_cast<float*>(pages.get())};
}

}  // namespace

Memory::Memory(std::int64_t elements, MemoryOptions options)
    : elements_(elements), options_(options) {
  if (elements < 0) {
    throw InvalidArgument("memory of " + std::to_string(elements) +
                          " elements: expected 0 or more");
  }
  if (!(options.decay >= 0.0F && options.decay <= 1.0F)) {
    throw InvalidArgument("memory with decay " + std::to_string(options.decay) +
                          ": expected a value in [0, 1]");
  }
  if (options.needs.state < 0) {
    throw InvalidArgument("memory with a state of " + std::to_string(options.needs.state) +
                          " floats: expected 0 or more");
  }
  if (packs()) {
    packed_current_ = PackedResidual(options.storage, elements);
    if (options_.transactional) packed_next_ = PackedResidual(options.storage, elements);
  } else {
    current_.data = allocate_generation(elements);
    if (options_.transactional) next_.data = allocate_generation(elements);
  }
  current_extra_ = allocate_generation(extra_elements());
  if (options_.transactional) next_extra_ = allocate_generation(extra_elements());
}

std::int64_t Memory::extra_elements() const {
  return (options_.needs.velocity ? elements_ : 0) + options_.needs.state;
}

std::size_t Memory::bytes() const {
  const std::size_t residuals =
      packs() ? packed_current_.bytes() + packed_next_.bytes()
              : generation_bytes(elements_) * ((current_.data ? 1 : 0) + (next_.data ? 1 : 0));
  return residuals + generation_bytes(extra_elements()) * (options_.transactional ? 2 : 1);
}

std::span<const float> Memory::current() const {
  if (packs() && !current_.data && elements_ > 0) {
    throw InvalidArgument("residual seen while it is packed\nhint: unpack() first, or read()");
  }
  return {current_.data.get(), size()};
}

void Memory::read(std::span<float> residual) const {
  if (packs()) {
    packed_current_.read(residual);
  } else {
    std::copy_n(current_.data.get(), elements_, residual.begin());
  }
}

std::optional<TensorView> Memory::as_stored() const {
  if (!packs()) return TensorView{current_.data.get(), elements_, DType::kF32};
  if (options_.storage != ResidualStorage::kBF16) return std::nullopt;
  return TensorView{const_cast<BF16*>(packed_current_.bf16().data()), elements_, DType::kBF16};
}

std::size_t Memory::scratch_bytes() const {
  if (!packs()) return 0;
  return aligned_bytes(elements_) * (options_.transactional ? 2 : 1);
}

void Memory::unpack(std::span<std::byte> scratch) {
  if (!packs()) return;
  if (scratch.size() < scratch_bytes()) {
    throw InvalidArgument("residual unpacked into " + std::to_string(scratch.size()) +
                          " bytes, expected " + std::to_string(scratch_bytes()));
  }
  const auto borrowed = [&](std::size_t at) {  // owns nothing
    auto* data = reinterpret_cast<float*>(scratch.data() + at);
    return Generation{.data = std::shared_ptr<float>(std::shared_ptr<float>(), data)};
  };
  current_ = borrowed(0);
  if (options_.transactional && !next_.adopted) next_ = borrowed(aligned_bytes(elements_));
  packed_current_.read({current_.data.get(), size()});
}

void Memory::pack(const Dither& dither) {
  if (!packs()) return;
  if (written_) {
    PackedResidual& to = options_.transactional ? packed_next_ : packed_current_;
    to.write({(options_.transactional ? next_ : current_).data.get(), size()}, &dither);
  }
  current_ = {};
  next_ = {};
}

bool Memory::opens() const {
  return options_.storage == ResidualStorage::kBF16 && options_.transactional;
}

void Memory::open(const Dither& dither) {
  if (!opens()) {
    throw InvalidArgument("residual opened that is not stored as bf16 in two generations");
  }
  next_ = {};  // what was adopted
  dither_ = dither;
}

std::span<const BF16> Memory::opened_current() const {
  check_open();
  return packed_current_.bf16();
}

std::span<BF16> Memory::opened_next() {
  check_open();
  written_ = true;
  return packed_next_.bf16();
}

const Dither& Memory::dither() const {
  check_open();
  return *dither_;
}

void Memory::check_open() const {
  if (!dither_) throw InvalidArgument("packed residual used before it was opened");
}

void Memory::adopt(std::shared_ptr<float> storage) {
  if (written_ || !options_.transactional) {
    throw InvalidArgument(std::string("memory given to a residual ") +
                          (written_ ? "inside a step\nhint: commit() first"
                                    : "that keeps one generation\nhint: use transactional=on"));
  }
  next_ = {.data = std::move(storage), .adopted = true};
}

std::span<float> Memory::next() {
  if (packs() && !current_.data && elements_ > 0) {
    throw InvalidArgument("residual written while it is packed\nhint: unpack() first");
  }
  written_ = true;
  if (!options_.transactional) return {current_.data.get(), size()};
  if (!next_.data) next_ = {.data = allocate_generation(elements_)};
  return {next_.data.get(), size()};
}

void Memory::commit() {
  if (written_ && options_.transactional) {
    std::swap(current_, next_);
    std::swap(packed_current_, packed_next_);
    std::swap(current_extra_, next_extra_);
  }
  // Where memory is adopted, it will be again: a spare of one's own would lie idle.
  if (current_.adopted || next_.adopted) next_ = {};
  written_ = false;
}

void Memory::rollback() {
  if (written_ && !options_.transactional) {
    throw InvalidArgument(
        "rollback of a memory that keeps one generation and was written\n"
        "hint: use transactional=on where steps may be taken back");
  }
  if (next_.adopted) next_ = {};
  written_ = false;
}

void Memory::scale(float factor) {
  if (written_) throw InvalidArgument("memory scaled inside a step\nhint: commit() first");
  if (packs()) {
    std::vector<float> values(size());
    packed_current_.read(values);
    for (float& value : values) value *= factor;
    packed_current_.write(values, nullptr);
  } else {
    for (float& value : std::span(current_.data.get(), size())) value *= factor;
  }
  for (float& value : velocity_of(current_extra_.get())) value *= factor;
}

void Memory::check_restore(std::size_t got, std::size_t expected, const char* what) const {
  if (written_) throw InvalidArgument("memory restored inside a step\nhint: commit() first");
  if (got != expected) {
    throw InvalidArgument(std::string(what) + " to restore has " + std::to_string(got) +
                          " elements, expected " + std::to_string(expected));
  }
}

void Memory::restore_part(std::span<const float> values, std::span<float> part,
                          const char* what) const {
  check_restore(values.size(), part.size(), what);
  std::copy(values.begin(), values.end(), part.begin());
}

void Memory::restore(std::span<const float> residual) {
  if (!packs()) {
    restore_part(residual, {current_.data.get(), size()}, "residual");
    return;
  }
  check_restore(residual.size(), size(), "residual");
  packed_current_.write(residual, nullptr);
}

void Memory::restore_velocity(std::span<const float> velocity) {
  restore_part(velocity, velocity_of(current_extra_.get()), "velocity");
}

void Memory::restore_state(std::span<const float> state) {
  restore_part(state, state_of(current_extra_.get()), "state");
}

void Memory::clear() {
  if (written_) throw InvalidArgument("memory cleared inside a step\nhint: commit() first");
  if (packs()) {
    packed_current_ = PackedResidual(options_.storage, elements_);
  } else {
    std::fill_n(current_.data.get(), elements_, 0.0F);
  }
  std::fill_n(current_extra_.get(), extra_elements(), 0.0F);
}

}  // namespace thinwire

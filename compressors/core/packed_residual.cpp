#include "compressors/core/packed_residual.h"

#include <algorithm>
#include <array>
#include <utility>

#include "compressors/core/error.h"
#include "compressors/core/packed_residual_kernels.h"

namespace thinwire {
namespace {

std::int64_t groups(std::int64_t elements) { return (elements + kPackedGroup - 1) / kPackedGroup; }

}  // namespace

std::size_t residual_bytes(ResidualStorage storage, std::int64_t elements) {
  return static_cast<std::size_t>(storage == ResidualStorage::kFP32
                                      ? elements * std::int64_t{sizeof(float)}
                                      : groups(elements) * packed_group_bytes(storage));
}

PackedResidual::PackedResidual(ResidualStorage storage, std::int64_t elements)
    : storage_(storage), elements_(elements), data_(allocate_pages(bytes())) {}

std::size_t PackedResidual::bytes() const { return residual_bytes(storage_, elements_); }

void PackedResidual::write(std::span<const float> values, const Dither* dither) {
  const std::int64_t whole = elements_ / kPackedGroup;
  std::byte* end = data_.get() + whole * packed_group_bytes(storage_);
  pack_groups(storage_, values.data(), dither, 0, whole, data_.get());
  if (whole == groups(elements_)) return;
  std::array<float, kPackedGroup> last{};
  std::copy(values.begin() + whole * kPackedGroup, values.end(), last.begin());
  pack_groups(storage_, last.data(), dither, whole, 1, end);
}

void PackedResidual::read(std::span<float> values) const {
  const std::int64_t whole = elements_ / kPackedGroup;
  unpack_groups(storage_, data_.get(), whole, values.data());
  if (whole == groups(elements_)) return;
  std::array<float, kPackedGroup> last;
  unpack_groups(storage_, data_.get() + whole * packed_group_bytes(storage_), 1, last.data());
  std::copy_n(last.begin(), elements_ - whole * kPackedGroup,
              values.begin() + whole * kPackedGroup);
}

std::span<const BF16> PackedResidual::bf16() const {
  if (storage_ != ResidualStorage::kBF16) {
    throw InvalidArgument("residual seen as bf16 while it is stored in blocks of 8 bits");
  }
  return {reinterpret_cast<const BF16*>(data_.get()), static_cast<std::size_t>(elements_)};
}

std::span<BF16> PackedResidual::bf16() {
  const std::span<const BF16> values = std::as_const(*this).bf16();
  return {const_cast<BF16*>(values.data()), values.size()};
}

}  // namespace thinwire

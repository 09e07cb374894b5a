#include "compressors/randmask/randmask.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "compressors/core/codec_support.h"
#include "compressors/core/spec_text.h"
#include "compressors/randmask/randmask_kernels.h"

namespace thinwire {
namespace {

std::int64_t product(std::span<const std::int64_t> shape) {
  std::int64_t n = 1;
  for (const std::int64_t side : shape) n *= side;
  return n;
}

class RandmaskCodec final : public LinearCodec {
 public:
  explicit RandmaskCodec(double density) : density_(density) {}

  std::string name() const override { return "randmask:" + number_text(density_); }
  Traits traits() const override { return {.granularity = 0}; }
  int rounds(std::uint64_t) const override { return 1; }
  std::int64_t round_elements(std::span<const std::int64_t> shape, int,
                              std::uint64_t) const override {
    return randmask_count(density_, product(shape));
  }
  std::size_t round_state_bytes(std::span<const std::int64_t>) const override { return 0; }

  // A value that is not finite makes the whole projection NaN, so that every rank sees it in the
  // mean, even when it lies at a position that is not sent.
  void project(const Context& ctx, int round, const Tensor& tensor,
               std::span<float> out) const override {
    check(ctx, round, tensor, out.size());
    if (!all_finite(tensor.grad, tensor.memory)) {
      fill_nan(out);
      return;
    }
    const float* residual = nullptr;
    float decay = 1;
    if (tensor.memory != nullptr) {
      residual = tensor.memory->current().data();
      decay = tensor.memory->decay();
    }
    visit(tensor.grad, [&](const auto* grad) {
      for_each_position(stream(ctx), static_cast<std::int64_t>(out.size()), tensor.grad.elements,
                        [&](std::int64_t i, std::int64_t position) {
                          float v = to_float(grad[position]);
                          if (residual != nullptr) v += decay * residual[position];
                          out[static_cast<std::size_t>(i)] = v;
                        });
    });
  }

  // A mean that is not finite leaves the gradient NaN and the memory unwritten.
  void absorb(const Context& ctx, int round, std::span<const float> reduced,
              const Tensor& tensor) const override {
    check(ctx, round, tensor, reduced.size());
    if (!std::all_of(reduced.begin(), reduced.end(), is_finite)) {
      fill_nan(tensor.grad);
      return;
    }
    RandmaskSpread args{.grad = tensor.grad};
    lend_memory(tensor.memory, args);
    randmask_spread(args);
    visit(tensor.grad, [&](auto* grad) {
      using T = std::remove_pointer_t<decltype(grad)>;
      for_each_position(stream(ctx), static_cast<std::int64_t>(reduced.size()),
                        tensor.grad.elements, [&](std::int64_t i, std::int64_t position) {
                          const T mean = from_float<T>(reduced[static_cast<std::size_t>(i)]);
                          grad[position] = mean;
                          // The final rounding to the gradient's dtype is fed back, too.
                          if (args.next != nullptr) args.next[position] -= to_float(mean);
                        });
    });
  }

 private:
  // The sender is left out: all ranks draw the same.
  static RandomStream stream(const Context& ctx) {
    return random_stream(ctx.key_hash, ctx.step, -1);
  }

  void check(const Context& ctx, int round, const Tensor& tensor, std::size_t size) const {
    check_device(ctx);
    if (round != 0) fail_argument(ctx, "round " + std::to_string(round) + ", expected 0");
    const std::int64_t n = tensor.grad.elements;
    if (product(tensor.shape) != n) {
      fail_argument(ctx, "shape of " + std::to_string(product(tensor.shape)) +
                             " elements, expected the gradient's " + std::to_string(n));
    }
    if (tensor.memory != nullptr && tensor.memory->elements() != n) {
      fail_argument(ctx, "memory of " + std::to_string(tensor.memory->elements()) +
                             " elements, expected the gradient's " + std::to_string(n));
    }
    const std::int64_t count = randmask_count(density_, n);
    if (static_cast<std::int64_t>(size) != count) {
      fail_argument(ctx, "projection of " + std::to_string(size) + " elements, expected " +
                             std::to_string(count));
    }
  }

  double density_;
};

}  // namespace

std::int64_t randmask_count(double density, std::int64_t n) {
  if (n == 0) return 0;
  const double count = std::ceil(density * static_cast<double>(n));
  return std::clamp(static_cast<std::int64_t>(count), std::int64_t{1}, n);
}

std::shared_ptr<const LinearCodec> make_randmask_codec(double density) {
  if (!(density > 0 && density <= 1)) {
    throw InvalidArgument("random mask of density " + number_text(density) +
                          ": expected a number in (0, 1]");
  }
  return std::make_shared<RandmaskCodec>(density);
}

}  // namespace thinwire

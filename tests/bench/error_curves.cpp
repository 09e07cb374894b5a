// What judging one layer costs a core: taking a sample of its gradient and residual, and the error
// curves of that sample without and with those of low ranks.
//
//   error_curves_bench [ROUNDS]
//
// Microseconds a layer: median [least, most] over the rounds (default 101). Layers come from a set
// larger than the caches, as a training step meets them.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "compressors/adaptive/error_curves.h"

namespace thinwire {
namespace {

constexpr std::size_t kColdBytes = std::size_t{256} << 20;

struct Layer {
  std::vector<float> grad;
  std::vector<float> residual;
};

double microseconds(auto&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

std::string spread(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  char text[64];
  std::snprintf(text, sizeof text, "%6.0f [%.0f, %.0f]", values[values.size() / 2], values.front(),
                values.back());
  return text;
}

void measure(const std::vector<std::int64_t>& shape, int rounds) {
  const MatrixExtents extents{std::span(shape)};
  const auto n = static_cast<std::size_t>(extents.elements());
  std::mt19937_64 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> noise(n + 997);
  for (float& x : noise) x = normal(engine);
  std::vector<Layer> layers(std::max<std::size_t>(2, kColdBytes / (2 * n * sizeof(float))));
  for (Layer& layer : layers) {
    layer.grad.assign(noise.begin(), noise.begin() + extents.elements());
    layer.residual.assign(noise.end() - extents.elements(), noise.end());
  }
  GradientSample sample;
  std::vector<double> taking;
  std::vector<double> without;
  std::vector<double> with;
  for (int round = -3; round < rounds; ++round) {
    Layer& layer = layers[static_cast<std::size_t>(round + 3) % layers.size()];
    const auto counter = static_cast<std::uint64_t>(round + 3);
    const double take = microseconds([&] {
      take_sample({.grad = view(layer.grad), .shape = shape, .residual = view(layer.residual)}, 1,
                  counter, sample);
    });
    ErrorCurves curves;
    const double plain = microseconds([&] { curves = measure_errors(sample, false); });
    const double all = microseconds([&] { curves += measure_errors(sample); });
    if (round < 0 || curves.nonfinite()) continue;
    taking.push_back(take);
    without.push_back(plain);
    with.push_back(all);
  }
  std::string text;
  for (const std::int64_t extent : shape)
    text += (text.empty() ? "" : "x") + std::to_string(extent);
  std::printf("%-14s %8zu  sample %s  curves %s  with low rank %s\n", text.c_str(),
              sample.values.size(), spread(taking).c_str(), spread(without).c_str(),
              spread(with).c_str());
}

}  // namespace
}  // namespace thinwire

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 101;
  if (rounds < 1) {
    std::fprintf(stderr, "usage: error_curves_bench [ROUNDS]\n");
    return 2;
  }
  std::printf("error_curves_bench %d: microseconds a layer\n", rounds);
  for (const std::vector<std::int64_t>& shape : std::vector<std::vector<std::int64_t>>{
           {512, 256}, {1024, 1024}, {4096, 4096}, {4'000'000}}) {
    thinwire::measure(shape, rounds);
  }
}

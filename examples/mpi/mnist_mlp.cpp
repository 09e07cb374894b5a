// Data-parallel training in plain C++ over MPI: a small MLP on MNIST whose gradients are reduced by
// a GradientReducer. Every rank draws its own batches, sums its gradients with the others' and
// takes the same step.
//
//   python examples/mpi/export_mnist.py mnist.bin
//   mpirun -np 4 build/release/examples/mnist_mlp mnist.bin --policy topk:0.01,values=q8
//   mpirun -np 4 build/release/examples/mnist_mlp mnist.bin --optimizer onebit-adam
//
// --optimizer sgd (the default), dgc or onebit-adam, whose policy is onebit unless another is
// given; after `make release`; as root with OMPI_ALLOW_RUN_AS_ROOT=1
// OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
#include <mpi.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "comm/mpi/mpi_communicator.h"
#include "comm/reducer.h"
#include "compressors/core/environment.h"
#include "optim/dgc_sgd.h"
#include "optim/onebit_adam.h"
#include "optim/sgd.h"

namespace {

using thinwire::Bucket;
using Floats = std::vector<float>;
namespace optim = thinwire::optim;

constexpr int kPixels = 784;
constexpr int kHidden = 128;
constexpr int kDigits = 10;
constexpr int kBatch = 32;  // a rank

struct Image {
  float pixels[kPixels];
  int label;
};

struct Arguments {
  std::string data;
  std::string optimizer = "sgd";
  std::string policy = thinwire::environment_policy().value_or("");
  int steps = 300;
  double min_accuracy = 0;
};

Arguments parse_arguments(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool has_value = i + 1 < argc;
    if (word == "--policy" && has_value) {
      arguments.policy = argv[++i];
    } else if (word == "--optimizer" && has_value) {
      arguments.optimizer = argv[++i];
    } else if (word == "--steps" && has_value) {
      arguments.steps = std::atoi(argv[++i]);
    } else if (word == "--min-accuracy" && has_value) {
      arguments.min_accuracy = std::atof(argv[++i]);
    } else {
      arguments.data = word;
    }
  }
  if (arguments.policy.empty()) {
    arguments.policy = arguments.optimizer == "onebit-adam" ? "onebit" : "topk:0.01,values=q8";
  }
  return arguments;
}

// Records of 784 pixels and a label, one byte each, in a fixed random order.
std::vector<Image> read_images(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<unsigned char> bytes(std::istreambuf_iterator<char>(file), {});
  std::vector<Image> images(bytes.size() / (kPixels + 1));
  if (images.empty()) {
    throw std::runtime_error("no images in '" + path +
                             "'\nhint: python examples/mpi/export_mnist.py " + path);
  }
  for (std::size_t i = 0; i < images.size(); ++i) {
    const unsigned char* record = &bytes[i * (kPixels + 1)];
    std::transform(record, record + kPixels, images[i].pixels,
                   [](unsigned char byte) { return static_cast<float>(byte) / 255.0F; });
    images[i].label = record[kPixels];
  }
  std::shuffle(images.begin(), images.end(), std::mt19937(1));
  return images;
}

// y[o] = b[o] + sum_i w[o][i] x[i]
void affine(const Floats& w, const Floats& b, const float* x, std::size_t inputs, float* y) {
  for (std::size_t o = 0; o < b.size(); ++o) {
    y[o] = std::inner_product(x, x + inputs, &w[o * inputs], b[o]);
  }
}

struct Mlp {
  Floats w1, b1, w2, b2;

  explicit Mlp(float scale = 0)
      : w1(kHidden * kPixels), b1(kHidden), w2(kDigits * kHidden), b2(kDigits) {
    std::mt19937 random(2);  // the same weights on every rank
    std::normal_distribution<float> normal;
    std::generate(w1.begin(), w1.end(), [&] { return scale * normal(random) / 28.0F; });
    std::generate(w2.begin(), w2.end(), [&] { return scale * normal(random) / 11.0F; });
  }
  std::array<Floats*, 4> tensors() { return {&w1, &b1, &w2, &b2}; }

  // Fills the hidden layer and the digits' probabilities.
  void forward(const Image& image, float* hidden, float* probability) const {
    affine(w1, b1, image.pixels, kPixels, hidden);
    std::transform(hidden, hidden + kHidden, hidden, [](float h) { return std::max(h, 0.0F); });
    affine(w2, b2, hidden, kHidden, probability);
    const float top = *std::max_element(probability, probability + kDigits);
    float sum = 0;
    for (int d = 0; d < kDigits; ++d) {
      sum += probability[d] = std::exp(probability[d] - top);
    }
    std::transform(probability, probability + kDigits, probability,
                   [sum](float p) { return p / sum; });
  }
};

// One rank's batch: its gradients, layer by layer from the back.
struct Backward {
  const Mlp& model;
  Mlp& gradient;
  std::vector<const Image*> batch;
  Floats hidden = Floats(kBatch * kHidden);
  Floats error = Floats(kBatch * kDigits);  // d loss / d logits
  double loss = 0;

  void output_layer() {
    std::fill(gradient.w2.begin(), gradient.w2.end(), 0.0F);
    std::fill(gradient.b2.begin(), gradient.b2.end(), 0.0F);
    for (std::size_t n = 0; n < batch.size(); ++n) {
      const float* h = &hidden[n * kHidden];
      float* e = &error[n * kDigits];
      model.forward(*batch[n], &hidden[n * kHidden], e);
      loss -= std::log(e[batch[n]->label]) / kBatch;
      e[batch[n]->label] -= 1.0F;
      for (std::size_t d = 0; d < kDigits; ++d) {
        e[d] /= kBatch;
        gradient.b2[d] += e[d];
        for (std::size_t j = 0; j < kHidden; ++j) {
          gradient.w2[d * kHidden + j] += e[d] * h[j];
        }
      }
    }
  }

  void hidden_layer() {
    std::fill(gradient.w1.begin(), gradient.w1.end(), 0.0F);
    std::fill(gradient.b1.begin(), gradient.b1.end(), 0.0F);
    for (std::size_t n = 0; n < batch.size(); ++n) {
      for (std::size_t j = 0; j < kHidden; ++j) {
        if (hidden[n * kHidden + j] <= 0) {
          continue;
        }
        float e = 0;
        for (std::size_t d = 0; d < kDigits; ++d) {
          e += error[n * kDigits + d] * model.w2[d * kHidden + j];
        }
        gradient.b1[j] += e;
        float* row = &gradient.w1[j * kPixels];
        for (int i = 0; i < kPixels; ++i) {
          row[i] += e * batch[n]->pixels[i];
        }
      }
    }
  }
};

double accuracy(const Mlp& model, const std::vector<Image>& images, std::size_t first) {
  Floats hidden(kHidden);
  Floats digits(kDigits);
  int right = 0;
  for (std::size_t i = first; i < images.size(); ++i) {
    model.forward(images[i], hidden.data(), digits.data());
    right += std::max_element(digits.begin(), digits.end()) - digits.begin() == images[i].label;
  }
  return 100.0 * right / static_cast<double>(images.size() - first);
}

// FNV-1a over the weights' bits.
unsigned long long hash(Mlp& model) {
  unsigned long long result = 14695981039346656037ULL;
  for (const Floats* tensor : model.tensors()) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(tensor->data());
    for (std::size_t i = 0; i < tensor->size() * sizeof(float); ++i) {
      result = (result ^ bytes[i]) * 1099511628211ULL;
    }
  }
  return result;
}

bool replicas_identical(Mlp& model, int ranks) {
  const unsigned long long mine = hash(model);
  std::vector<unsigned long long> all(static_cast<std::size_t>(ranks));
  MPI_Allgather(&mine, 1, MPI_UNSIGNED_LONG_LONG, all.data(), 1, MPI_UNSIGNED_LONG_LONG,
                MPI_COMM_WORLD);
  return std::all_of(all.begin(), all.end(), [mine](auto other) { return other == mine; });
}

std::shared_ptr<optim::Optimizer> make_optimizer(const Arguments& arguments,
                                                 thinwire::GradientReducer& reducer) {
  const auto layers = optim::all_layers(reducer);
  if (arguments.optimizer == "sgd") {
    return optim::Sgd::make(reducer, layers, {{.lr = 0.05, .momentum = 0.9}});
  }
  if (arguments.optimizer == "dgc") {
    return optim::DgcSgd::make(reducer, layers, {{.lr = 0.05, .momentum = 0.9}});
  }
  if (arguments.optimizer == "onebit-adam") {  // the variance freezes after a fifth of the steps
    return optim::OneBitAdam::make(reducer, layers, {{.lr = 1e-3}},
                                   {.at_step = std::max(1, arguments.steps / 5)});
  }
  throw std::runtime_error("--optimizer " + arguments.optimizer +
                           ": expected sgd, dgc or onebit-adam");
}

int train(const Arguments& arguments, int rank, int ranks) {
  const std::vector<Image> images = read_images(arguments.data);
  const std::size_t training = images.size() * 4 / 5;  // the rest is for testing
  Mlp model(1);
  Mlp gradient;

  thinwire::ReducerOptions options;
  options.deadline = std::chrono::seconds(60);
  options.report = [](const std::string& text) { std::cerr << text << std::endl; };
  options.end_program = [] { MPI_Abort(MPI_COMM_WORLD, 1); };
  thinwire::GradientReducer reducer(thinwire::make_mpi_communicator(MPI_COMM_WORLD),
                                    {{"fc1.weight", {kHidden, kPixels}},
                                     {"fc1.bias", {kHidden}},
                                     {"fc2.weight", {kDigits, kHidden}},
                                     {"fc2.bias", {kDigits}}},
                                    thinwire::Policy::parse(arguments.policy), options);
  if (rank == 0) {
    std::cerr << reducer.summary() << std::endl;
  }

  const std::shared_ptr<optim::Optimizer> optimizer = make_optimizer(arguments, reducer);
  std::vector<optim::Parameter> parameters;
  for (std::size_t t = 0; t < 4; ++t) {
    parameters.push_back(
        {thinwire::view(*model.tensors()[t]), thinwire::view(*gradient.tensors()[t])});
  }

  std::mt19937 random(1000U + static_cast<unsigned>(rank));
  for (int step = 1; step <= arguments.steps; ++step) {
    Backward backward{model, gradient, {}};
    for (int n = 0; n < kBatch; ++n) {
      backward.batch.push_back(&images[random() % training]);
    }
    // The output layer's gradients travel while the hidden layer's are computed.
    backward.output_layer();
    reducer.reduce({{{2, thinwire::view(gradient.w2)}, {3, thinwire::view(gradient.b2)}}, false});
    backward.hidden_layer();
    reducer.reduce({{{0, thinwire::view(gradient.w1)}, {1, thinwire::view(gradient.b1)}}, true})
        ->wait();
    optimizer->step(parameters);

    if (rank == 0 && (step % 50 == 0 || step == arguments.steps)) {
      const thinwire::ReducerStats stats = reducer.stats();
      std::printf("step %4d  loss %.3f  accuracy %.1f %%  wire %.3f MB a rank, 1/%.0f of fp32\n",
                  step, backward.loss, accuracy(model, images, training),
                  static_cast<double>(stats.wire_bytes) / 1e6, stats.ratio);
    }
  }
  const bool identical = replicas_identical(model, ranks);
  const double reached = accuracy(model, images, training);
  if (rank == 0) {
    std::printf("replicas %s (%016llx)\n", identical ? "identical" : "DIFFER", hash(model));
  }
  return identical && reached >= arguments.min_accuracy ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  int provided = 0;  // the reducer communicates on a thread of its own
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  int rank = 0;
  int ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  int result = 1;
  try {
    result = train(parse_arguments(argc, argv), rank, ranks);
  } catch (const std::exception& error) {
    std::cerr << "rank " << rank << ": " << error.what() << std::endl;
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
  return result;
}

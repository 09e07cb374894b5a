// What collectives are predicted to take, in seconds, from the number of ranks P, the bytes and the
// link: so that all ranks choose the faster one alike. Of transfers alone, not of encoding; all
// ranks start together. Every figure is 0 for one rank and grows with P, bytes and latency. Pure
// functions, thread-safe.
#pragma once

#include <algorithm>

namespace thinwire {

// The way from any rank to any other. A message of b bytes takes latency + b / bytes_per_second; a
// rank sends and receives one at a time. The default is 10 Gbit/s Ethernet between hosts.
struct Link {
  double latency_seconds = 25e-6;
  double bytes_per_second = 1.25e9;
};

// Gradients that are reduced together by default in PyTorch's DDP, in bytes as they are in memory.
inline constexpr double kUsualBucketBytes = 25.0 * 1024 * 1024;
// The part of so many bytes of gradients that such a bucket holds.
inline double share_of_usual_bucket(double gradient_bytes) {
  return std::min(1.0, kUsualBucketBytes / std::max(gradient_bytes, 1.0));
}

// One message to the next of a ring, or to one partner after the other, P - 1 times.
double allgather_seconds(const Link& link, int ranks, double bytes_a_rank);
double alltoall_seconds(const Link& link, int ranks, double bytes_a_block);
// 2 (P - 1) messages of a P-th of `bytes`.
double ring_allreduce_seconds(const Link& link, int ranks, double bytes);

// The exchanges of comm/exchange.h. `gradient_bytes`: of the whole group as it travels, fp32.
inline double dense_seconds(const Link& link, int ranks, double gradient_bytes) {
  return ring_allreduce_seconds(link, ranks, gradient_bytes);
}
// `message_bytes`: with the payloads of all layers.
inline double sparse_seconds(const Link& link, int ranks, double message_bytes) {
  return allgather_seconds(link, ranks, message_bytes);
}
// Quantised or split-reduce. `message_bytes`: with one owner's ranges of all layers.
inline double requantising_seconds(const Link& link, int ranks, double message_bytes) {
  return alltoall_seconds(link, ranks, message_bytes) +
         allgather_seconds(link, ranks, message_bytes);
}
// One of a linear exchange's rounds.
inline double linear_seconds(const Link& link, int ranks, double round_bytes) {
  return ring_allreduce_seconds(link, ranks, round_bytes);
}

}  // namespace thinwire

#include "comm/collective_cost.h"

namespace thinwire {

namespace {

double messages_seconds(const Link& link, int count, double bytes) {
  return count * (link.latency_seconds + bytes / link.bytes_per_second);
}

}  // namespace

double allgather_seconds(const Link& link, int ranks, double bytes_a_rank) {
  return messages_seconds(link, ranks - 1, bytes_a_rank);
}

double alltoall_seconds(const Link& link, int ranks, double bytes_a_block) {
  return messages_seconds(link, ranks - 1, bytes_a_block);
}

double ring_allreduce_seconds(const Link& link, int ranks, double bytes) {
  return messages_seconds(link, 2 * (ranks - 1), bytes / ranks);
}

}  // namespace thinwire

// LinkModel: seconds of each verb on this group's network, by what a rank sends: fixed + bytes *
// per_byte. Measured at start-up, kept current from the steps. Pure values, the same on all ranks
// where they come from the same times.
#pragma once

#include <array>
#include <cstddef>

#include "comm/collective_cost.h"
#include "comm/communicator.h"
#include "comm/metered_communicator.h"

namespace thinwire {

struct VerbCost {
  double fixed = 0;     // seconds
  double per_byte = 0;  // seconds a byte of sent_payload()

  double seconds(double sent) const { return fixed + per_byte * sent; }
};

struct LinkModel {
  std::array<VerbCost, kVerbs> verbs{};

  const VerbCost& operator[](Verb verb) const { return verbs[static_cast<std::size_t>(verb)]; }
  VerbCost& operator[](Verb verb) { return verbs[static_cast<std::size_t>(verb)]; }

  // A transfer took so long: moves the part of its cost that dominates, by half of the difference
  // and eightfold at most. Of no effect unless `seconds` is finite and above 0.
  void observe(Verb verb, double sent, double seconds);
};

// What the verbs would take on a link, and the link that they look like.
LinkModel link_model(const Link& link, int ranks);
Link link_of(const LinkModel& model, int ranks);

// Collective: times every verb, with few bytes and with more and more until one takes some 20 ms.
// Of the ranks' times the least counts, that of the rank which nobody waited for. The same result
// on all ranks.
LinkModel probe_link(Communicator& comm, Deadline deadline);

}  // namespace thinwire

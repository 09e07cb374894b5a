// Gloo over TCP: the library's own ring allreduce, ring allgather and direct all-to-all, run in
// order by a thread of the communicator. Ranks meet through a gloo Store, which must stay reachable
// for the roll call after a failure.
//
// The destructor waits until every peer has come to its own, because a rank that leaves resets its
// connections and loses what its peers have not read: at most 2 s, 4 s with collectives in flight,
// and not at all after a failure or abort().
//
// Obeys comm/communicator.h. Never load this (and with it libgloo) into a process that holds
// torch, whose own Gloo exports the same symbols: there c10d is the transport.
#pragma once

#include <gloo/rendezvous/store.h>

#include <chrono>
#include <memory>
#include <string>

#include "comm/communicator.h"

namespace thinwire {

struct GlooOptions {
  std::string hostname = {};   // address or name to listen on; empty: the machine's own name
  std::string interface = {};  // or the network interface; takes precedence over hostname
  std::chrono::milliseconds connect_timeout{30'000};
  // No single collective takes longer than this, whatever deadline its wait() gets.
  std::chrono::milliseconds collective_timeout{300'000};
};

// Collective over the ranks [0, size): returns when all are connected; TransportError by
// connect_timeout otherwise. Keys of `store` must be this group's alone (a gloo PrefixStore, whose
// inner store must outlive the communicator).
std::unique_ptr<Communicator> make_gloo_communicator(int rank, int size,
                                                     std::shared_ptr<gloo::rendezvous::Store> store,
                                                     const GlooOptions& options = {});

}  // namespace thinwire

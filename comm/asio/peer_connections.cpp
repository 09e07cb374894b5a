#include "comm/asio/peer_connections.h"

#include <ifaddrs.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/host_name.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <sstream>
#include <system_error>

namespace thinwire {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr int kSendBufferBytes = 256 * 1024;
constexpr std::size_t kReadBytes = 64 * 1024;
constexpr std::chrono::seconds kHelloLimit{10};
constexpr const char* kShut = "the connections were shut";
constexpr const char* kInterfaceHint =
    "\nhint: GLOO_SOCKET_IFNAME names the network interfaces to use";

constexpr std::size_t kWordChars = 16;

// What a rank says first on a connection that it has made.
struct Hello {
  std::array<char, kWordChars> word;
  std::uint32_t rank;
};

constexpr std::uint32_t kAnnounced = 0xffffffff;

struct Header {
  std::uint32_t number;  // of the block, from 0
  std::uint32_t bytes;   // or kAnnounced: it comes elsewhere
};
static_assert(sizeof(Header) == kPeerFraming.header);

std::string random_word() {
  std::random_device random;
  std::ostringstream text;
  text << std::hex;
  for (std::size_t i = 0; i < kWordChars; ++i) text << (random() & 15U);
  return text.str();
}

struct Address {
  tcp::endpoint endpoint;
  std::string word;
};

Address parse(const std::string& text) {
  std::istringstream in(text);
  std::string host;
  unsigned short port = 0;
  Address address;
  in >> host >> port >> address.word;
  error_code error;
  address.endpoint = {asio::ip::make_address(host, error), port};
  if (!in || error || address.word.size() != kWordChars) {
    throw TransportError("expected a peer's address as \"HOST PORT WORD\", got \"" + text + "\"");
  }
  return address;
}

// For poll(): 0 where the deadline has passed, a minute at most.
int milliseconds_until(Deadline deadline) {
  const auto now = Clock::now();
  if (deadline <= now) return 0;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now).count();
  return static_cast<int>(std::min<std::int64_t>(left, 60'000));
}

// Whether one of `events` happened on the descriptor before the deadline.
bool happens(int handle, short events, Deadline deadline) {
  for (;;) {
    pollfd entry{handle, events, 0};
    const int ready = ::poll(&entry, 1, milliseconds_until(deadline));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return false;
    if (ready == 0 && Clock::now() >= deadline) return false;
  }
}

// An empty text where it connected.
std::string connect_before(tcp::socket& socket, const tcp::endpoint& to, Deadline deadline) {
  error_code error;
  socket.open(to.protocol(), error);
  if (!error) socket.native_non_blocking(true, error);
  if (error) return error.message();
  if (::connect(socket.native_handle(), to.data(), static_cast<socklen_t>(to.size())) == 0) {
    return "";
  }
  if (errno != EINPROGRESS) return std::generic_category().message(errno);
  if (!happens(socket.native_handle(), POLLOUT, deadline)) return "no answer before the deadline";
  int result = 0;
  socklen_t length = sizeof result;
  ::getsockopt(socket.native_handle(), SOL_SOCKET, SO_ERROR, &result, &length);
  return result == 0 ? "" : std::generic_category().message(result);
}

bool is_of_this_host(const asio::ip::address& address) {
  asio::io_context io;
  tcp::socket socket(io);
  error_code error;
  const tcp::endpoint endpoint(address, 0);
  socket.open(endpoint.protocol(), error);
  if (!error) socket.bind(endpoint, error);
  return !error;
}

std::string address_of_interface(const std::string& name) {
  ifaddrs* first = nullptr;
  if (::getifaddrs(&first) != 0) {
    throw TransportError("cannot list network interfaces: " +
                         std::generic_category().message(errno));
  }
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> all(first, &freeifaddrs);
  for (const ifaddrs* entry = first; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || name != entry->ifa_name) continue;
    if (entry->ifa_addr->sa_family == AF_INET) {
      sockaddr_in address{};
      std::memcpy(&address, entry->ifa_addr, sizeof address);
      return asio::ip::address_v4(ntohl(address.sin_addr.s_addr)).to_string();
    }
    if (entry->ifa_addr->sa_family == AF_INET6) {
      sockaddr_in6 address{};
      std::memcpy(&address, entry->ifa_addr, sizeof address);
      asio::ip::address_v6::bytes_type bytes;
      std::memcpy(bytes.data(), &address.sin6_addr, bytes.size());
      return asio::ip::address_v6(bytes, address.sin6_scope_id).to_string();
    }
  }
  throw TransportError("network interface '" + name + "' has no address" + kInterfaceHint);
}

}  // namespace

std::string default_peer_host() {
  if (const char* names = std::getenv("GLOO_SOCKET_IFNAME"); names != nullptr && *names != '\0') {
    const std::string all = names;
    return address_of_interface(all.substr(0, all.find(',')));
  }
  asio::io_context io;
  error_code error;
  const std::string name = asio::ip::host_name(error);
  if (!error) {
    for (const auto& found : tcp::resolver(io).resolve(name, "", error)) {
      const asio::ip::address address = found.endpoint().address();
      if (is_of_this_host(address)) return address.to_string();
    }
  }
  return asio::ip::address_v4::loopback().to_string();
}

class PeerConnections::Connections {
 public:
  Connections(int rank, int size, const std::string& host);

  const std::string& address() const { return address_; }
  void connect(const std::vector<std::string>& addresses, Deadline deadline);
  bool send(int rank, std::span<const std::byte> block);
  void receive(int rank, std::span<std::byte> block, Receipt& receipt);
  // Reads from those peers that blocks are expected of, once one has sent something or `until` is
  // there.
  void progress(Deadline until);
  void wait(int rank, const Receipt& receipt, Deadline deadline);
  void abort() noexcept;

 private:
  struct Expected {
    std::span<std::byte> block;
    Receipt* receipt;
    std::uint32_t number;
  };
  struct Peer {
    explicit Peer(asio::io_context& io) : socket(io) {}

    tcp::socket socket;
    std::size_t room = 0;  // bytes on their way that the send buffer surely holds
    std::uint32_t sent = 0;
    std::vector<std::byte> unsent;  // the rest of a write that was cut all the same
    std::uint32_t asked = 0;
    std::deque<Expected> expected;
    std::vector<std::byte> inbox;  // read, not yet taken
    bool in_block = false;         // the header of the first expected block was read
    std::size_t taken = 0;         // of that block
    std::string error;
  };

  Peer& peer(int rank) { return peers_[static_cast<std::size_t>(rank)]; }
  void connect_to(int rank, const Address& to, Deadline deadline);
  // The connection of a rank above this one; whoever does not know the word is sent away.
  void accept_one(Deadline deadline);
  bool is_expected(const Hello& hello) const;
  std::string ranks_missing() const;
  static void prepare(Peer& peer);
  void write(Peer& to, std::span<const std::byte> header, std::span<const std::byte> block);
  static void flush(Peer& to);
  void read(int rank);
  // From the inbox to the blocks that are expected.
  void take(int rank);
  bool take_header(int rank, std::span<const std::byte> bytes, bool& announced);
  static void fail(Peer& peer, const std::string& error);

  int rank_;
  std::string word_;
  std::string address_;
  asio::io_context io_;
  tcp::acceptor acceptor_;
  std::vector<Peer> peers_;
  std::vector<int> handles_;  // of the connections, for abort()
  std::vector<std::byte> buffer_;
  std::vector<pollfd> polled_;
  std::vector<int> polled_ranks_;
  std::atomic<bool> aborted_{false};
};

PeerConnections::Connections::Connections(int rank, int size, const std::string& host)
    : rank_(rank), word_(random_word()), acceptor_(io_), buffer_(kReadBytes) {
  for (int peer = 0; peer < size; ++peer) peers_.emplace_back(io_);
  try {
    const tcp::endpoint any_port(asio::ip::make_address(host), 0);
    acceptor_.open(any_port.protocol());
    acceptor_.bind(any_port);
    acceptor_.listen(std::max(size, 16));
    acceptor_.non_blocking(true);
    address_ = host + ' ' + std::to_string(acceptor_.local_endpoint().port()) + ' ' + word_;
  } catch (const boost::system::system_error& error) {
    throw TransportError("rank " + std::to_string(rank) + " cannot listen at " + host + ": " +
                         error.what());
  }
}

void PeerConnections::Connections::connect(const std::vector<std::string>& addresses,
                                           Deadline deadline) {
  if (addresses.size() != peers_.size()) {
    throw InvalidArgument("expected the addresses of " + std::to_string(peers_.size()) +
                          " ranks, got " + std::to_string(addresses.size()));
  }
  for (int rank = 0; rank < rank_; ++rank) {
    connect_to(rank, parse(addresses[static_cast<std::size_t>(rank)]), deadline);
  }
  for (std::size_t rank = static_cast<std::size_t>(rank_) + 1; rank < peers_.size(); ++rank) {
    accept_one(deadline);
  }
  acceptor_.close();
  for (Peer& peer : peers_) {
    if (peer.socket.is_open()) handles_.push_back(peer.socket.native_handle());
  }
}

void PeerConnections::Connections::connect_to(int rank, const Address& to, Deadline deadline) {
  tcp::socket& socket = peer(rank).socket;
  std::string error = connect_before(socket, to.endpoint, deadline);
  if (error.empty()) {
    Hello hello{};
    std::copy(to.word.begin(), to.word.end(), hello.word.begin());
    hello.rank = static_cast<std::uint32_t>(rank_);
    error_code failed;
    asio::write(socket, asio::buffer(&hello, sizeof hello), failed);
    if (failed) error = failed.message();
  }
  if (!error.empty()) {
    throw TransportError("rank " + std::to_string(rank_) + " cannot connect to rank " +
                         std::to_string(rank) + " at " + to.endpoint.address().to_string() + ": " +
                         error + kInterfaceHint);
  }
  prepare(peer(rank));
}

void PeerConnections::Connections::accept_one(Deadline deadline) {
  for (;;) {
    if (!happens(acceptor_.native_handle(), POLLIN, deadline)) {
      throw TransportError("rank " + std::to_string(rank_) + " waited in vain for rank " +
                           ranks_missing() + " to connect" + kInterfaceHint);
    }
    error_code error;
    tcp::socket socket(io_);
    acceptor_.accept(socket, error);
    if (error) continue;
    socket.non_blocking(true);
    Hello hello{};
    std::size_t got = 0;
    const Deadline end = std::min(deadline, Clock::now() + kHelloLimit);
    while (got < sizeof hello && (!error || error == asio::error::would_block) &&
           happens(socket.native_handle(), POLLIN, end)) {
      auto* rest = reinterpret_cast<std::byte*>(&hello) + got;
      got += socket.read_some(asio::buffer(rest, sizeof hello - got), error);
    }
    if (got < sizeof hello || !is_expected(hello)) continue;
    Peer& from = peer(static_cast<int>(hello.rank));
    from.socket = std::move(socket);
    prepare(from);
    return;
  }
}

bool PeerConnections::Connections::is_expected(const Hello& hello) const {
  return std::equal(word_.begin(), word_.end(), hello.word.begin(), hello.word.end()) &&
         hello.rank > static_cast<std::uint32_t>(rank_) && hello.rank < peers_.size() &&
         !peers_[hello.rank].socket.is_open();
}

std::string PeerConnections::Connections::ranks_missing() const {
  std::string missing;
  for (std::size_t rank = static_cast<std::size_t>(rank_) + 1; rank < peers_.size(); ++rank) {
    if (peers_[rank].socket.is_open()) continue;
    missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
  }
  return missing;
}

void PeerConnections::Connections::prepare(Peer& peer) {
  error_code error;
  peer.socket.set_option(tcp::no_delay(true), error);
  peer.socket.set_option(asio::socket_base::send_buffer_size(kSendBufferBytes), error);
  asio::socket_base::send_buffer_size held;
  peer.socket.get_option(held, error);
  peer.socket.non_blocking(true, error);
  // The kernel counts its own records of what it holds, which for short messages take as much.
  peer.room = static_cast<std::size_t>(std::max(0, held.value())) / 2;
}

bool PeerConnections::Connections::send(int rank, std::span<const std::byte> block) {
  if (aborted_) throw TransportError(kShut);
  Peer& to = peer(rank);
  int on_its_way = 0;
  ::ioctl(to.socket.native_handle(), SIOCOUTQ, &on_its_way);
  const bool fits = to.unsent.empty() &&
                    static_cast<std::size_t>(on_its_way) + sizeof(Header) + block.size() <= to.room;
  const Header header{to.sent++, fits ? static_cast<std::uint32_t>(block.size()) : kAnnounced};
  write(to, std::as_bytes(std::span(&header, 1)), fits ? block : std::span<const std::byte>());
  return fits;
}

// Where the kernel takes less than it should, the rest is kept and sent by progress().
void PeerConnections::Connections::write(Peer& to, std::span<const std::byte> header,
                                         std::span<const std::byte> block) {
  std::size_t done = 0;
  if (to.unsent.empty()) {
    error_code error;
    done = to.socket.write_some(std::array{asio::buffer(header.data(), header.size()),
                                           asio::buffer(block.data(), block.size())},
                                error);
    if (error && error != asio::error::would_block) return fail(to, error.message());
  }
  for (std::span<const std::byte> part : {header, block}) {
    const std::size_t sent = std::min(done, part.size());
    done -= sent;
    to.unsent.insert(to.unsent.end(), part.begin() + static_cast<std::ptrdiff_t>(sent), part.end());
  }
}

void PeerConnections::Connections::flush(Peer& to) {
  error_code error;
  const std::size_t done =
      to.socket.write_some(asio::buffer(to.unsent.data(), to.unsent.size()), error);
  if (error && error != asio::error::would_block) return fail(to, error.message());
  to.unsent.erase(to.unsent.begin(), to.unsent.begin() + static_cast<std::ptrdiff_t>(done));
}

void PeerConnections::Connections::receive(int rank, std::span<std::byte> block, Receipt& receipt) {
  Peer& from = peer(rank);
  receipt = Receipt::kPending;
  from.expected.push_back({block, &receipt, from.asked++});
  take(rank);
}

void PeerConnections::Connections::wait(int rank, const Receipt& receipt, Deadline deadline) {
  while (receipt == Receipt::kPending) {
    if (aborted_) throw TransportError(kShut);
    if (!peer(rank).error.empty()) throw TransportError(peer(rank).error);
    if (Clock::now() >= deadline) throw TransportError("no answer before the deadline");
    progress(deadline);
  }
}

void PeerConnections::Connections::progress(Deadline until) {
  if (aborted_) return;  // whose blocks are expected may be gone
  polled_.clear();
  polled_ranks_.clear();
  for (int rank = 0; rank < static_cast<int>(peers_.size()); ++rank) {
    Peer& one = peer(rank);
    const int events = (one.expected.empty() ? 0 : POLLIN) | (one.unsent.empty() ? 0 : POLLOUT);
    if (events == 0 || !one.error.empty()) continue;
    polled_.push_back({one.socket.native_handle(), static_cast<short>(events), 0});
    polled_ranks_.push_back(rank);
  }
  if (::poll(polled_.data(), polled_.size(), milliseconds_until(until)) <= 0 || aborted_) return;
  for (std::size_t i = 0; i < polled_.size(); ++i) {
    Peer& one = peer(polled_ranks_[i]);
    if ((polled_[i].revents & POLLOUT) != 0 && !one.unsent.empty()) flush(one);
    if ((polled_[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !one.expected.empty()) {
      read(polled_ranks_[i]);
    }
  }
}

void PeerConnections::Connections::read(int rank) {
  Peer& from = peer(rank);
  error_code error;
  const std::size_t got =
      from.socket.read_some(asio::buffer(buffer_.data(), buffer_.size()), error);
  if (error == asio::error::would_block) return;
  if (error) {
    return fail(
        from, "rank " + std::to_string(rank) + " closed its connection (" + error.message() + ")");
  }
  from.inbox.insert(from.inbox.end(), buffer_.begin(),
                    buffer_.begin() + static_cast<std::ptrdiff_t>(got));
  take(rank);
}

void PeerConnections::Connections::take(int rank) {
  Peer& from = peer(rank);
  std::span<const std::byte> rest = from.inbox;
  while (!from.expected.empty()) {
    const Expected next = from.expected.front();
    bool announced = false;
    if (!from.in_block) {
      if (rest.size() < sizeof(Header) || !take_header(rank, rest, announced)) break;
      rest = rest.subspan(sizeof(Header));
    }
    if (!announced) {
      const std::size_t part = std::min(next.block.size() - from.taken, rest.size());
      std::copy_n(rest.begin(), part, next.block.begin() + static_cast<std::ptrdiff_t>(from.taken));
      rest = rest.subspan(part);
      from.taken += part;
      if (from.taken < next.block.size()) break;
    }
    from.in_block = false;
    from.taken = 0;
    from.expected.pop_front();
    *next.receipt = announced ? Receipt::kElsewhere : Receipt::kHere;
  }
  from.inbox.erase(from.inbox.begin(), from.inbox.end() - static_cast<std::ptrdiff_t>(rest.size()));
}

bool PeerConnections::Connections::take_header(int rank, std::span<const std::byte> bytes,
                                               bool& announced) {
  Peer& from = peer(rank);
  const Expected& next = from.expected.front();
  Header header{};
  std::memcpy(&header, bytes.data(), sizeof header);
  announced = header.bytes == kAnnounced;
  if (header.number != next.number || (!announced && header.bytes != next.block.size())) {
    fail(from, "rank " + std::to_string(rank) + " sent block " + std::to_string(header.number) +
                   " of " + std::to_string(header.bytes) + " bytes where rank " +
                   std::to_string(rank_) + " expected block " + std::to_string(next.number) +
                   " of " + std::to_string(next.block.size()));
    return false;
  }
  from.in_block = !announced;
  return true;
}

void PeerConnections::Connections::fail(Peer& peer, const std::string& error) {
  if (peer.error.empty()) peer.error = error;
  peer.unsent.clear();
}

void PeerConnections::Connections::abort() noexcept {
  if (aborted_.exchange(true)) return;
  for (const int handle : handles_) ::shutdown(handle, SHUT_RDWR);
}

PeerConnections::PeerConnections(int rank, int size, const std::string& host)
    : connections_(std::make_unique<Connections>(rank, size, host)) {}

PeerConnections::~PeerConnections() = default;

const std::string& PeerConnections::address() const { return connections_->address(); }

void PeerConnections::connect(const std::vector<std::string>& addresses, Deadline deadline) {
  connections_->connect(addresses, deadline);
}

bool PeerConnections::send(int peer, std::span<const std::byte> block) {
  return connections_->send(peer, block);
}

void PeerConnections::receive(int peer, std::span<std::byte> block, Receipt& receipt) {
  connections_->receive(peer, block, receipt);
}

void PeerConnections::poll() { connections_->progress(Deadline::min()); }

void PeerConnections::wait(int peer, const Receipt& receipt, Deadline deadline) {
  connections_->wait(peer, receipt, deadline);
}

void PeerConnections::abort() noexcept { connections_->abort(); }

}  // namespace thinwire

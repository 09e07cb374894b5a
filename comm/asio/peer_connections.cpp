#include "comm/asio/peer_connections.h"

#include <fcntl.h>
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
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <sstream>
#include <system_error>
#include <utility>

#include "compressors/core/environment.h"

namespace thinwire {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr int kSendBufferBytes = 1 << 20;
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

void close_on_exec(int handle) { ::fcntl(handle, F_SETFD, FD_CLOEXEC); }

// An empty text where it connected.
std::string connect_before(tcp::socket& socket, const tcp::endpoint& to, Deadline deadline) {
  error_code error;
  error = socket.open(to.protocol(), error);
  if (!error) error = socket.native_non_blocking(true, error);
  if (error) return error.message();
  close_on_exec(socket.native_handle());
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
  error = socket.open(endpoint.protocol(), error);
  if (!error) error = socket.bind(endpoint, error);
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
  if (const auto names = environment_gloo_interfaces()) {
    return address_of_interface(names->substr(0, names->find(',')));
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

class PeerConnections::Impl {
 public:
  Impl(int rank, int size, const std::string& host, std::size_t room_bytes);

  const std::string& address() const { return address_; }
  void connect(const std::vector<std::string>& addresses, Deadline deadline);
  bool send(int rank, std::span<const std::byte> block);
  void receive(int rank, std::span<std::byte> block, Receipt& receipt,
               std::function<void()> elsewhere);
  // Reads from those peers that blocks are expected of, once one has sent something or `until` is
  // there.
  void progress(Deadline until);
  // Until `done`.
  template <typename Done>
  void progress_until(Done done, Deadline deadline);
  bool flushed() const;
  bool failed(int rank) const { return !peers_[static_cast<std::size_t>(rank)].error.empty(); }
  void abort() noexcept;

 private:
  struct Expected {
    std::span<std::byte> block;
    Receipt* receipt;
    std::function<void()> elsewhere;
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

    // Something is to come, or to go.
    bool awaited() const { return !expected.empty() || !unsent.empty(); }
  };

  Peer& peer(int rank) { return peers_[static_cast<std::size_t>(rank)]; }
  void connect_to(int rank, const Address& to, Deadline deadline);
  // The connection of a rank above this one; whoever does not know the word is sent away.
  void accept_one(Deadline deadline);
  bool is_expected(const Hello& hello) const;
  template <typename Which>
  std::string ranks_where(Which which) const;
  void prepare(Peer& peer) const;
  void write(int rank, std::span<const std::byte> header, std::span<const std::byte> block);
  void write_unsent(int rank);
  void read(int rank);
  // From the inbox to the blocks that are expected.
  void take(int rank);
  bool take_header(int rank, std::span<const std::byte> bytes, bool& announced);
  void fail(int rank, const std::string& error);
  void fail_closed(int rank, const error_code& error);

  int rank_;
  std::size_t room_bytes_;
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

PeerConnections::Impl::Impl(int rank, int size, const std::string& host, std::size_t room_bytes)
    : rank_(rank),
      room_bytes_(room_bytes),
      word_(random_word()),
      acceptor_(io_),
      buffer_(kReadBytes) {
  for (int peer = 0; peer < size; ++peer) peers_.emplace_back(io_);
  try {
    const tcp::endpoint any_port(asio::ip::make_address(host), 0);
    acceptor_.open(any_port.protocol());
    close_on_exec(acceptor_.native_handle());
    acceptor_.bind(any_port);
    acceptor_.listen(std::max(size, 16));
    acceptor_.non_blocking(true);
    address_ = host + ' ' + std::to_string(acceptor_.local_endpoint().port()) + ' ' + word_;
  } catch (const boost::system::system_error& error) {
    throw TransportError("rank " + std::to_string(rank) + " cannot listen at " + host + ": " +
                         error.what());
  }
}

void PeerConnections::Impl::connect(const std::vector<std::string>& addresses, Deadline deadline) {
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

void PeerConnections::Impl::connect_to(int rank, const Address& to, Deadline deadline) {
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

void PeerConnections::Impl::accept_one(Deadline deadline) {
  for (;;) {
    if (Clock::now() >= deadline || !happens(acceptor_.native_handle(), POLLIN, deadline)) {
      const auto missing = [this](const Peer& one) {
        return &one > &peers_[static_cast<std::size_t>(rank_)] && !one.socket.is_open();
      };
      throw TransportError("rank " + std::to_string(rank_) +
                           " waited in vain for the connection of rank " + ranks_where(missing) +
                           kInterfaceHint);
    }
    error_code error;
    tcp::socket socket(io_);
    error = acceptor_.accept(socket, error);
    if (error == asio::error::would_block || error == asio::error::connection_aborted) continue;
    if (error) {
      throw TransportError("rank " + std::to_string(rank_) +
                           " cannot accept connections: " + error.message());
    }
    close_on_exec(socket.native_handle());
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

bool PeerConnections::Impl::is_expected(const Hello& hello) const {
  return std::equal(word_.begin(), word_.end(), hello.word.begin(), hello.word.end()) &&
         hello.rank > static_cast<std::uint32_t>(rank_) && hello.rank < peers_.size() &&
         !peers_[hello.rank].socket.is_open();
}

template <typename Which>
std::string PeerConnections::Impl::ranks_where(Which which) const {
  std::string ranks;
  for (std::size_t rank = 0; rank < peers_.size(); ++rank) {
    if (!std::invoke(which, peers_[rank])) continue;
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
  }
  return ranks;
}

void PeerConnections::Impl::prepare(Peer& peer) const {
  error_code error;
  asio::socket_base::send_buffer_size held;
  error = peer.socket.set_option(tcp::no_delay(true), error);
  if (!error) {
    const asio::socket_base::send_buffer_size wanted(kSendBufferBytes);
    error = peer.socket.set_option(wanted, error);
  }
  if (!error) error = peer.socket.get_option(held, error);
  if (!error) error = peer.socket.non_blocking(true, error);
  if (error) {
    throw TransportError("rank " + std::to_string(rank_) +
                         " cannot set up a connection: " + error.message());
  }
  // Half of what the kernel holds, which counts its own records, too: asio gives it as asked for.
  peer.room = room_bytes_ > 0 ? room_bytes_ : static_cast<std::size_t>(std::max(0, held.value()));
}

bool PeerConnections::Impl::send(int rank, std::span<const std::byte> block) {
  if (aborted_) throw TransportError(kShut);
  Peer& to = peer(rank);
  if (!to.error.empty()) throw TransportError(to.error);
  int on_its_way = 0;
  ::ioctl(to.socket.native_handle(), SIOCOUTQ, &on_its_way);
  const bool fits = to.unsent.empty() &&
                    static_cast<std::size_t>(on_its_way) + sizeof(Header) + block.size() <= to.room;
  const Header header{to.sent++, fits ? static_cast<std::uint32_t>(block.size()) : kAnnounced};
  write(rank, std::as_bytes(std::span(&header, 1)), fits ? block : std::span<const std::byte>());
  return fits;
}

// Where the kernel takes less than it should, the rest is kept.
void PeerConnections::Impl::write(int rank, std::span<const std::byte> header,
                                  std::span<const std::byte> block) {
  Peer& to = peer(rank);
  std::size_t done = 0;
  if (to.unsent.empty()) {
    error_code error;
    done = to.socket.write_some(std::array{asio::buffer(header.data(), header.size()),
                                           asio::buffer(block.data(), block.size())},
                                error);
    if (error && error != asio::error::would_block) return fail_closed(rank, error);
  }
  for (std::span<const std::byte> part : {header, block}) {
    const std::size_t sent = std::min(done, part.size());
    done -= sent;
    to.unsent.insert(to.unsent.end(), part.begin() + static_cast<std::ptrdiff_t>(sent), part.end());
  }
}

void PeerConnections::Impl::write_unsent(int rank) {
  Peer& to = peer(rank);
  error_code error;
  const std::size_t done =
      to.socket.write_some(asio::buffer(to.unsent.data(), to.unsent.size()), error);
  if (error && error != asio::error::would_block) return fail_closed(rank, error);
  to.unsent.erase(to.unsent.begin(), to.unsent.begin() + static_cast<std::ptrdiff_t>(done));
}

void PeerConnections::Impl::receive(int rank, std::span<std::byte> block, Receipt& receipt,
                                    std::function<void()> elsewhere) {
  Peer& from = peer(rank);
  receipt = Receipt::kPending;
  from.expected.push_back({block, &receipt, std::move(elsewhere), from.asked++});
  take(rank);
}

template <typename Done>
void PeerConnections::Impl::progress_until(Done done, Deadline deadline) {
  for (bool late = false; !done(); late = Clock::now() >= deadline) {
    if (aborted_) throw TransportError(kShut);
    for (const Peer& one : peers_) {
      if (one.awaited() && !one.error.empty()) throw TransportError(one.error);
    }
    if (late) {
      throw TransportError("nothing came of rank " + ranks_where(&Peer::awaited) +
                           " before the deadline");
    }
    progress(deadline);
  }
}

bool PeerConnections::Impl::flushed() const {
  return std::all_of(peers_.begin(), peers_.end(), [](const Peer& p) { return p.unsent.empty(); });
}

void PeerConnections::Impl::progress(Deadline until) {
  if (aborted_) return;  // the memory of expected blocks may be gone
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
    if ((polled_[i].revents & POLLOUT) != 0 && !one.unsent.empty()) {
      write_unsent(polled_ranks_[i]);
    }
    if ((polled_[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !one.expected.empty()) {
      read(polled_ranks_[i]);
    }
  }
}

void PeerConnections::Impl::read(int rank) {
  Peer& from = peer(rank);
  error_code error;
  const std::size_t got =
      from.socket.read_some(asio::buffer(buffer_.data(), buffer_.size()), error);
  if (error == asio::error::would_block) return;
  if (error) return fail_closed(rank, error);
  from.inbox.insert(from.inbox.end(), buffer_.begin(),
                    buffer_.begin() + static_cast<std::ptrdiff_t>(got));
  take(rank);
}

void PeerConnections::Impl::take(int rank) {
  Peer& from = peer(rank);
  std::span<const std::byte> rest = from.inbox;
  while (!from.expected.empty()) {
    const Expected& next = from.expected.front();
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
    const Expected taken = std::move(from.expected.front());
    from.expected.pop_front();
    *taken.receipt = announced ? Receipt::kElsewhere : Receipt::kHere;
    if (announced) taken.elsewhere();
  }
  from.inbox.erase(from.inbox.begin(), from.inbox.end() - static_cast<std::ptrdiff_t>(rest.size()));
}

bool PeerConnections::Impl::take_header(int rank, std::span<const std::byte> bytes,
                                        bool& announced) {
  Peer& from = peer(rank);
  const Expected& next = from.expected.front();
  Header header{};
  std::memcpy(&header, bytes.data(), sizeof header);
  announced = header.bytes == kAnnounced;
  if (header.number != next.number || (!announced && header.bytes != next.block.size())) {
    fail(rank, "rank " + std::to_string(rank) + " sent block " + std::to_string(header.number) +
                   " of " + std::to_string(header.bytes) + " bytes where rank " +
                   std::to_string(rank_) + " expected block " + std::to_string(next.number) +
                   " of " + std::to_string(next.block.size()));
    return false;
  }
  from.in_block = !announced;
  return true;
}

// Nothing more is read or written: what would follow a block that was cut is none.
void PeerConnections::Impl::fail(int rank, const std::string& error) {
  Peer& lost = peer(rank);
  if (lost.error.empty()) lost.error = error;
  lost.unsent.clear();
  ::shutdown(lost.socket.native_handle(), SHUT_RDWR);
}

void PeerConnections::Impl::fail_closed(int rank, const error_code& error) {
  fail(rank, "rank " + std::to_string(rank) + " closed its connection (" + error.message() + ")");
}

void PeerConnections::Impl::abort() noexcept {
  if (aborted_.exchange(true)) return;
  for (const int handle : handles_) ::shutdown(handle, SHUT_RDWR);
}

PeerConnections::PeerConnections(int rank, int size, const std::string& host,
                                 std::size_t room_bytes)
    : impl_(std::make_unique<Impl>(rank, size, host, room_bytes)) {}

PeerConnections::~PeerConnections() = default;

const std::string& PeerConnections::address() const { return impl_->address(); }

void PeerConnections::connect(const std::vector<std::string>& addresses, Deadline deadline) {
  impl_->connect(addresses, deadline);
}

bool PeerConnections::send(int peer, std::span<const std::byte> block) {
  return impl_->send(peer, block);
}

void PeerConnections::receive(int peer, std::span<std::byte> block, Receipt& receipt,
                              std::function<void()> elsewhere) {
  impl_->receive(peer, block, receipt, std::move(elsewhere));
}

void PeerConnections::poll() { impl_->progress(Deadline::min()); }

void PeerConnections::wait(const Receipt& receipt, Deadline deadline) {
  impl_->progress_until([&receipt] { return receipt != Receipt::kPending; }, deadline);
}

void PeerConnections::flush(Deadline deadline) {
  impl_->progress_until([this] { return flushed(); }, deadline);
}

bool PeerConnections::flushed() const { return impl_->flushed(); }

bool PeerConnections::failed(int peer) const { return impl_->failed(peer); }

void PeerConnections::abort() noexcept { impl_->abort(); }

}  // namespace thinwire

// The runtime behind emulator.h, and the CUDA runtime's functions that the launchers call.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef __x86_64__
#error "the emulator changes stacks by x86-64 instructions"
#endif

// Saves the callee's registers and stack pointer to *from, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace ijckd {
extern std::atomic<int> refused_features;  // launch.cuh's
}

namespace emulator {
namespace {

// The other sanitizers' build has no calls before plain loads and stores: only what instructions do is seen there.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kSeesPlainAccesses = false;
#else
constexpr bool kSeesPlainAccesses = true;
#endif

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
// Blocks that the GPU holds at a time: so few that a kernel which waits for others' must take turns.
constexpr int kResident = 3;
constexpr int kCluster = 8;  // blocks of the largest cluster that every GPU with clusters serves
static_assert(kResident <= kCluster);
constexpr size_t kStack = 64 << 10;
// At equal distances of a power of two all would share a cache's few sets.
constexpr size_t kStackStride = kStack + 13 * 64;
constexpr size_t kSharedLimit = 48 << 10;  // of shared memory for a kernel that asked for no more, as on every GPU
constexpr size_t kLargeSharedLimit = 227 << 10;  // for one that did, on the largest GPUs
constexpr size_t kMultiprocessorShared = 228 << 10;
constexpr size_t kGuard = 256;         // bytes between shared arrays, owned by nobody
constexpr size_t kDistance = 1 << 20;  // at least, between the call's arrays
constexpr size_t kDynamicAlign = 1024;
constexpr size_t kDynamicOffset = kDynamicAlign;  // in the arena; static arrays lie behind it
constexpr size_t kStaticOffset = kDynamicOffset + kLargeSharedLimit + 4096;
constexpr size_t kSharedArena = kStaticOffset + 2 * kSharedLimit + 4096;
constexpr size_t kDynamicElement = 2;
constexpr size_t kCopy = 16;  // bytes that one asynchronous copy writes
constexpr int kRankBit = 20;  // of an address in a cluster: from here on one more than the block's rank, 0 for the own
static_assert(kSharedArena <= size_t(1) << kRankBit);
constexpr size_t kPage = 4096, kWord = 4;  // bytes of global memory; what a launch did is known of each word

constexpr size_t kTileRow = 128;  // bytes; the 128-byte swizzle repeats every 8 of them
constexpr size_t kTileAlign = 8 * kTileRow;
constexpr int kWarpgroup = 4;  // warps
constexpr int kWarpgroups = kMaxThreads / kWarp / kWarpgroup;
constexpr int kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;  // of an mbarrier's phase
constexpr size_t kDescribed = 1 << 18;  // bytes of shared memory that a matrix descriptor can point into
static_assert(kDynamicOffset % kTileAlign == 0 && kDynamicOffset + kLargeSharedLimit <= kDescribed);

enum class Kind { load, store, atomic, copy };  // copy: asynchronous, of a recorded launch

// Who touched one element last.
struct Touch {
  // Of shared memory a block's number, through all launches from 1; of global memory that of its visit: two that only
  // the grid's barrier orders are another's, as those of two launches are. 0 is nobody.
  uint32_t block = 0, epoch = 0, warp_epoch = 0;
  uint32_t arrivals = 0;   // of the thread at the cluster's barrier, before
  uint16_t thread = 0;     // or kMany, or kWarpOf + warp: several threads of that warp
  bool in_flight = false;  // a store by a copy that has not landed
  bool atomic = false;
  bool several = false;  // other blocks of the cluster too, at no later arrival
};
constexpr uint16_t kMany = UINT16_MAX;  // threads
constexpr uint16_t kWarpOf = 1 << 15;

struct Cell {
  Touch store, load;
};

// A range of memory that kernels may touch, in elements.
struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  size_t element = 1;
  Access access = Access::inout;
  bool shared = false;
  bool frozen = false, parameters = false;  // no launch stores to it; the kernel's own
  std::vector<Cell> cells;                  // none: readable, unwatched
  const void* site = nullptr;               // of a static shared array
};

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  Place place;
  uint32_t group;
};

struct Mbarrier;
struct Warp;

// What a thread has been told by others: phases of mbarriers that are complete, multiplications of warps that have been
// waited for.
struct Knowledge {
  std::map<const Mbarrier*, uint32_t> phases;
  std::map<const Warp*, uint32_t> multiplies;

  void add(const Knowledge& o) {
    for (const auto& [barrier, phase] : o.phases) raise(phases[barrier], phase);
    for (const auto& [warp, count] : o.multiplies) raise(multiplies[warp], count);
  }
  static void raise(uint32_t& to, uint32_t value) { to = std::max(to, value); }
};

template <typename Key>
uint32_t known(const std::map<Key, uint32_t>& of, Key key) {
  const auto found = of.find(key);
  return found == of.end() ? 0 : found->second;
}

// An mbarrier: a phase is complete once all arrivals and all bytes that they announced have come.
struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;   // announced and not come
  uint32_t phase = 0;  // phases completed
  int initialiser = 0;
  uint32_t initialised = 0;  // arrivals of that thread at the cluster's barrier, before
  bool fenced = false;
  Knowledge gathered, told;                   // what threads know that have arrived; told: in complete phases
  std::vector<uint32_t> seen;                 // phases that each thread knows to be complete, from a wait of its own
  uint32_t seen_by_one = 0, seen_by_all = 0;  // all: what one knew at the last barrier
};

// What the emulated driver keeps in a CUtensorMap.
struct TiledMap {
  uint64_t magic;
  const char* base;
  uint64_t columns, rows, stride;  // stride in bytes
  uint32_t box_columns, box_rows;
  CUtensorMapSwizzle swizzle;
};
constexpr uint64_t kMapMagic = 0x70616d726f736e74;
static_assert(sizeof(TiledMap) <= sizeof(CUtensorMap));

struct TileCopy {
  char* to;
  TiledMap map;
  int column, row;
  Mbarrier* barrier;
  uint32_t phase;  // of the barrier, at the start
  int thread;
  bool foreign;  // of another block
  Place place;
  bool landed;
};

// Who of the asynchronous proxy touched 16 bytes of dynamic shared memory last; a Cell knows of loads and stores only.
struct Granule {
  uint32_t copy = 0;                // 1 + index of a TileCopy
  uint32_t read[kWarpgroups] = {};  // 1 + index of a warpgroup's Multiply
};

// One warp's registers [16, 8 * blocks] while multiplications add to them.
struct Accumulators {
  float* d[kWarp];
  int blocks = 0;
  std::vector<float> sum;
  uint32_t last = 0;  // 1 + index of the last Multiply
};

struct Multiply {
  uint64_t a, b;
  int blocks;
  bool transposed, a_transposed;
  Half type;
  Place place;
  std::vector<uint32_t> copies;                   // whose bytes it reads
  std::array<Accumulators*, kWarpgroup> to = {};  // of each warp
};

// Four warps issue the same multiplications, each at its own time; they run when all four have committed them.
struct Warpgroup {
  std::deque<Multiply> multiplies;
  std::vector<uint32_t> ends;  // of each group, in multiplies
  uint32_t done = 0;           // multiplies that have run
};

struct Thread {
  enum State { ready, waiting, returned };
  void* stack_pointer = nullptr;
  uintptr_t stack = 0;
  State state = ready;
  const char* what = nullptr;         // it waits at
  Place place{};                      // of that
  const Mbarrier* barrier = nullptr;  // it waits for
  uint3 index{};
  std::vector<Copy> copies;                          // under way, oldest first
  uint32_t groups = 0;                               // closed
  uint32_t cluster_arrived = 0, cluster_waited = 0;  // phases of the cluster's barrier
  bool earlier_ended = false;                        // it knows that the launch before has ended
  Knowledge known;
};

// Threads that wait for one another at one place in the source.
struct Meeting {
  int arrived = 0;
  const char* what = nullptr;
  int argument = 0;  // must be equal for all
  Place place{};

  bool is_at(const char* w, int a, Place p) const {
    return w == what && a == argument && p.line == place.line && (p.file == place.file || !strcmp(p.file, place.file));
  }
};

// What a lane brings to a warp-wide instruction.
struct Lane {
  uint32_t bits;
  const void* row;
  float* sum;
  uint32_t* fragments;
  const uint32_t *a, *b;
  uint64_t descriptor_a, descriptor_b;
};

struct Warp {
  Meeting meeting;
  Lane lanes[kWarp];
  int size = 0, returned = 0, at_barrier = 0;  // threads
  uint32_t epoch = 0;                          // __syncwarps passed

  bool fenced = false;                   // its registers, since the last group
  uint32_t issued = 0;                   // multiplications
  uint32_t committed = 0;                // groups
  uint32_t waited = 0, waited_sync = 0;  // multiplications whose end it has waited for; and as of the last barrier
  std::list<Accumulators> accumulators;
};

// What a block of a recorded launch did at one place of its code, in global memory.
struct Accesses {
  uint64_t times = 0, bytes = 0;
  uintptr_t lowest = UINTPTR_MAX, end = 0;
  std::vector<uint32_t> by_thread;
};

// What a block of a recorded launch did in global memory.
struct Recorded {
  std::map<std::pair<Kind, uintptr_t>, Accesses> accesses;  // by address of code
  // bytes that tile copies brought, by array (begin, bytes), box and how many blocks each copy was for
  std::map<std::tuple<uintptr_t, uint64_t, uint64_t, int>, uint64_t> tiles;
};

// Launches that are recorded, as text that scripts/kernel_record.py reads.
struct Recording {
  bool on = false;
  int multiprocessors = 0;
  int receivers = 1;  // blocks that a tile copy is for
  std::ostringstream text;
};

// A block that has been started and not ended.
struct Block {
  uint32_t block_number = 0;
  uint32_t visit = 0;  // a number of its own for each stretch between the grid's barriers
  uint3 block_index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Region> shared;
  Region dynamic;           // its cells stay from block to block
  size_t shared_bytes = 0;  // as the GPU counts them
  size_t arena_used = 0;
  Meeting barrier, grid_barrier;
  uint32_t epoch = 0;  // barriers passed
  int returned = 0;
  bool allowed_next = false;  // the next launch's blocks to start

  // in its cluster, which alone it is without one
  int rank = 0;
  uint32_t first_block = 0;    // the cluster's first block_number
  bool reached = false;        // its shared memory, by another block
  uint32_t reached_after = 0;  // arrivals of the last one's thread at the cluster's barrier
  std::string reached_by;
  bool reached_by_loads = false;

  // of its asynchronous proxy
  std::map<uintptr_t, Mbarrier> barriers;
  std::deque<TileCopy> tiles;
  std::vector<uint32_t> under_way;  // of tiles, oldest first
  std::vector<Granule> granules;    // of dynamic shared memory
  bool granules_used = false;
  std::array<Warpgroup, kWarpgroups> warpgroups;
  size_t dynamic_align = 0;     // declared
  bool generic_stores = false;  // to dynamic shared memory; barriers do not count
  int64_t generic_epoch = -1;   // of the last load or store there
  Recorded recorded;

  char* stacks = nullptr;
  char* arena = nullptr;
};

// With the block that runs, or the last one that did.
struct Machine : Block {
  Schedule schedule = Schedule::forward;
  Async async = Async::lazy;
  std::mt19937 random{1};
  Counts counts;
  std::vector<Region> arrays;                          // of the call
  bool arrays_named = false, arrays_launched = false;  // launched: a kernel that uses them
  std::map<const void*, size_t> dynamic_limits;        // of kernels that asked for more
  int device = 0;
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  cudaError_t last_error = cudaSuccess;
  Recording recording;

  // of the launch
  void (*body)(void*) = nullptr;
  void* started = nullptr;
  dim3 grid, block;
  bool cooperative = false;
  uint32_t blocks_started = 0, visits = 0;  // in all launches
  uint32_t first_visit = 1;                 // since the grid's last barrier
  size_t shared_limit = kSharedLimit;
  // A cooperative launch's blocks, or a cluster's; the running one's place is empty.
  std::array<Block, kCluster> group;
  int cluster = 1;           // blocks
  int cluster_arrivals = 0;  // of threads in the phase under way
  uint32_t cluster_phase = 0;
  Knowledge cluster_gathered, cluster_told;
  int refused = 0;                // launch attributes that the driver refuses, as bits of their ids
  bool refused_together = false;  // all of them in one launch; otherwise each

  // Of launches, by their numbers from 1: those from early_from to the one before this may be unfinished until its
  // threads wait for them, those from late_from to the one before that also afterwards.
  uint32_t number = 0, early_from = 1, late_from = 1;
  bool dependent = false;
  bool waited = false;              // some thread of the launch has
  bool waited_before_next = false;  // before its block let the next launch start
  bool follows_unknown = false;     // the launch before, of which the call's arrays are, was in no call of the test's
  struct Word {
    uint32_t stored = 0, loaded = 0;  // by which launch last
  };
  std::unordered_map<uintptr_t, std::array<Word, kPage / kWord>> pages;
  std::pair<uintptr_t, std::array<Word, kPage / kWord>*> last_pages[64] = {};

  int running = -1;     // thread, or -1 outside kernels
  uintptr_t stack = 0;  // its
  void* scheduler = nullptr;
  std::string violation;
};

Machine m;

// "file:line" of the call that returns to `code`.
std::string where(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  char command[512], line[512] = "";
  snprintf(command, sizeof command, "addr2line -e '%s' %#tx", info.dli_fname,
           static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1);
  if (FILE* pipe = popen(command, "r")) {
    if (!fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  const std::string text(line, strcspn(line, " \n"));
  return text.substr(text.rfind('/') + 1);
}

std::string where(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

std::string name(uint32_t thread) {
  const uint3 i = m.threads[thread].index;
  std::ostringstream s;
  s << "thread (" << i.x << ", " << i.y << ", " << i.z << ")";
  return s.str();
}

std::string block_name() {
  std::ostringstream s;
  s << "block (" << m.block_index.x << ", " << m.block_index.y << ", " << m.block_index.z << ")";
  return s.str();
}

void leave() { emulator_switch(&m.threads[m.running].stack_pointer, m.scheduler); }

void wait(const char* what, Place place) {
  Thread& t = m.threads[m.running];
  t.state = Thread::waiting;
  t.what = what;
  t.place = place;
  leave();
}

// Ends the launch: the scheduler throws the text. Never returns.
template <typename... Parts>
[[noreturn]] void violate(const char* kind, const Parts&... parts) {
  std::ostringstream s;
  s << kind << ": " << name(m.running) << " of " << block_name() << " ";
  (s << ... << parts);
  if (!m.stack) {  // for a thread whose copy the scheduler lands
    m.running = -1;
    throw std::runtime_error(s.str());
  }
  m.violation = s.str();
  for (;;) leave();
}

std::ostream& operator<<(std::ostream& s, const Meeting& meeting) {
  return s << meeting.what << " in " << where(meeting.place);
}

Thread& own_thread() { return m.threads[m.running]; }
Block& block_of(int rank) { return rank == m.rank ? m : m.group[rank]; }
Warp& own_warp() { return m.warps[m.running / kWarp]; }
Warpgroup& own_warpgroup() { return m.warpgroups[m.running / kWarp / kWarpgroup]; }

void thread_main() {
  m.body(m.started);
  Thread& t = m.threads[m.running];
  t.state = Thread::returned;
  ++m.returned;
  ++own_warp().returned;
  m.waited_before_next |= !m.allowed_next && t.earlier_ended;
  if (m.barrier.arrived) violate("synccheck", "returned while others wait at ", m.barrier);
  if (m.grid_barrier.arrived) violate("synccheck", "returned while others wait at ", m.grid_barrier);
  if (own_warp().meeting.arrived)
    violate("synccheck", "returned while others of its warp wait at ", own_warp().meeting);
  if (t.cluster_arrived > t.cluster_waited)
    violate("synccheck", "returned before it had waited for the cluster's barrier, at which it had arrived");
  if (!t.copies.empty())
    violate("synccheck", "returned before the copy it started in ", where(t.copies[0].place), " had landed");
  if (own_warp().issued > own_warp().waited)
    violate("synccheck", "returned before it had waited for the multiplication in ",
            where(own_warpgroup().multiplies[own_warp().waited].place));
  for (;;) leave();
}

// The calling lane meets the others of its warp; the last one does `act(warp)` for all.
template <typename Act>
void meet_warp(const char* what, int argument, Place place, const Lane& lane, const Act& act) {
  Warp& w = own_warp();
  Meeting& meeting = w.meeting;
  const auto lacks = [&](const auto&... why) {
    violate("synccheck", "is at ", what, " in ", where(place), ", ", why...);
  };
  if (w.size < kWarp) lacks("but its warp has ", w.size, " threads");
  if (w.returned) lacks("but ", w.returned, " threads of its warp have returned");
  if (w.at_barrier) lacks("others of its warp are at ", m.barrier.arrived ? m.barrier : m.grid_barrier);
  if (meeting.arrived && !meeting.is_at(what, argument, place)) lacks("others of its warp are at ", meeting);
  meeting.what = what;
  meeting.argument = argument;
  meeting.place = place;
  w.lanes[m.running % kWarp] = lane;
  if (++meeting.arrived < kWarp) return wait(what, place);
  meeting.arrived = 0;
  act(w);
  const int first = m.running / kWarp * kWarp;
  for (int l = 0; l < kWarp; ++l) m.threads[first + l].state = Thread::ready;
}

bool greedy() { return m.schedule == Schedule::greedy || m.schedule == Schedule::greedy_reverse; }
bool backwards() { return m.schedule == Schedule::reverse || m.schedule == Schedule::greedy_reverse; }

char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for the threads' stacks");
  return static_cast<char*>(p);
}

// Room for a block of the launch.
void prepare_block(size_t dynamic_bytes) {
  if (!m.stacks) {
    m.stacks = reserve(kStackStride * kMaxThreads);
    m.arena = reserve(kSharedArena);
    m.dynamic.name = "dynamic shared memory";
    m.dynamic.element = kDynamicElement;
    m.dynamic.access = Access::out;
    m.dynamic.shared = true;
  }
  const dim3 b = m.block;
  m.threads.resize(b.x * b.y * b.z);
  m.warps.resize((m.threads.size() + kWarp - 1) / kWarp);
  m.dynamic.begin = reinterpret_cast<uintptr_t>(m.arena) + kDynamicOffset;
  m.dynamic.end = m.dynamic.begin + dynamic_bytes;
  m.dynamic.cells.resize((dynamic_bytes + kDynamicElement - 1) / kDynamicElement);
  m.granules.assign((dynamic_bytes + kCopy - 1) / kCopy, {});
  for (uint32_t i = 0; i < m.threads.size(); ++i) {
    m.threads[i].stack = reinterpret_cast<uintptr_t>(m.stacks) + kStackStride * i;
    m.threads[i].index = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
  }
}

void start_block(uint64_t index) {
  const dim3 g = m.grid;
  m.block_index = {uint32_t(index % g.x), uint32_t(index / g.x % g.y), uint32_t(index / (uint64_t(g.x) * g.y))};
  m.block_number = m.first_block = ++m.blocks_started;
  m.rank = 0;
  m.allowed_next = m.reached = m.reached_by_loads = false;
  m.reached_after = 0;
  for (Thread& t : m.threads) {
    t.state = Thread::ready;
    t.barrier = nullptr;
    t.copies.clear();
    t.groups = t.cluster_arrived = t.cluster_waited = 0;
    t.earlier_ended = false;
    t.known = {};
#ifdef __SANITIZE_ADDRESS__
    // Of frames that were left without returning.
    __asan_unpoison_memory_region(reinterpret_cast<void*>(t.stack), kStack);
#endif
    // what emulator_switch pops: six registers, then the address to return to; aligned as after a call
    void** top = reinterpret_cast<void**>(t.stack + kStack) - 1;
    *--top = reinterpret_cast<void*>(&thread_main);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    t.stack_pointer = top;
  }
  for (size_t i = 0; i < m.warps.size(); ++i) {
    m.warps[i] = {};
    m.warps[i].size = static_cast<int>(std::min<size_t>(kWarp, m.threads.size() - i * kWarp));
  }
  m.shared.clear();
  m.shared_bytes = m.dynamic.end - m.dynamic.begin;
  m.arena_used = kStaticOffset;
  memset(reinterpret_cast<void*>(m.dynamic.begin), 0xFF, m.shared_bytes);  // NaN in every floating type
  m.barrier = m.grid_barrier = {};
  m.epoch = 0;
  m.returned = 0;
  m.barriers.clear();
  m.tiles.clear();
  m.under_way.clear();
  if (m.granules_used) std::fill(m.granules.begin(), m.granules.end(), Granule{});
  m.granules_used = false;
  for (Warpgroup& g : m.warpgroups)
    if (!g.multiplies.empty() || !g.ends.empty()) g = {};
  m.dynamic_align = 0;
  m.generic_stores = false;
  m.generic_epoch = -1;
}

// What the threads of a block wait for that will not come.
std::string deadlock() {
  std::map<std::string, int> waits;
  for (const Thread& t : m.threads) {
    if (t.state != Thread::waiting) continue;
    std::ostringstream s;
    s << t.what << " in " << where(t.place);
    if (t.barrier)
      s << " (phase " << t.barrier->phase << " lacks " << t.barrier->pending << " arrivals and " << t.barrier->bytes
        << " bytes)";
    ++waits[s.str()];
  }
  std::string text = "synccheck: all threads of " + block_name() + " wait";
  for (const auto& [what, threads] : waits) text += ", " + std::to_string(threads) + " at " + what;
  return text;
}

void land(TileCopy& c);

// Lands one of the copies of tiles that are under way; whether there was one.
bool land_one() {
  if (m.under_way.empty()) return false;
  const size_t i = m.schedule == Schedule::random ? m.random() % m.under_way.size() : 0;
  TileCopy& copy = m.tiles[m.under_way[i]];
  m.under_way.erase(m.under_way.begin() + i);
  m.running = copy.foreign ? 0 : copy.thread;
  land(copy);
  m.running = -1;
  return true;
}

// All threads of the block, of which each is at its barrier or the grid's, go on.
void pass_barrier() {
  ++m.epoch;
  bool ended = false;
  for (const Thread& t : m.threads) ended |= t.earlier_ended;
  for (Thread& t : m.threads) t.state = Thread::ready, t.earlier_ended = ended;
  for (Warp& w : m.warps) w.at_barrier = 0, w.waited_sync = w.waited;
  for (auto& [address, phases] : m.barriers) phases.seen_by_all = phases.seen_by_one;
}

// How far a block has come: to its end, to the grid's barrier as a whole, to where it waits for others of its cluster;
// or it has run all its threads once and can go on.
enum class Came { to_end, to_grid_barrier, nowhere, further };

// `once`: returns after a turn of every thread.
Came run_block(bool once = false) {
  const int n = static_cast<int>(m.threads.size());
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (backwards()) std::reverse(order.begin(), order.end());
  // Lets the ready threads among order[first, last) run, each until it waits or returns; whether there was one.
  const auto turn = [&](int first, int last) {
    bool ran = false;
    for (int k = first; k < last; ++k) {
      if (m.threads[order[k]].state != Thread::ready) continue;
      ran = true;
      m.running = order[k];
      m.stack = m.threads[order[k]].stack;
      emulator_switch(&m.scheduler, m.threads[order[k]].stack_pointer);
      m.running = -1;
      m.stack = 0;
      if (!m.violation.empty()) throw std::runtime_error(std::exchange(m.violation, {}));
    }
    return ran;
  };
  bool came = false;
  while (m.returned < n) {
    if (came && once) return Came::further;
    if (m.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), m.random);
    const int group = greedy() ? kWarp : n;
    bool ran = false;
    for (int first = 0; first < n; first += group)
      while (turn(first, std::min(n, first + group))) {
        ran = true;
        if (!greedy()) break;
      }
    if (ran || land_one()) {
      came = true;
      continue;
    }
    if (m.grid_barrier.arrived == n) return Came::to_grid_barrier;
    if (m.cluster > 1) return came ? Came::further : Came::nowhere;
    throw std::runtime_error(deadlock());
  }
  for (const TileCopy& c : m.tiles)
    if (!c.landed || c.barrier->seen_by_one <= c.phase)
      throw std::runtime_error("synccheck: " + block_name() +
                               " ended before anyone had waited for the copy started in " + where(c.place));
  return Came::to_end;
}

void change_over(uint64_t i) { std::swap(static_cast<Block&>(m), m.group[i]); }

// The blocks of a cooperative launch, each as far as it gets, until all have ended. All come to the grid's barrier or
// none.
void run_together(std::vector<uint64_t> order, size_t dynamic_bytes) {
  std::map<uint64_t, uint64_t> place;  // in m.group
  for (const uint64_t i : order) {
    place.emplace(i, place.size());
    change_over(place[i]);
    prepare_block(dynamic_bytes);
    start_block(i);
    change_over(place[i]);
  }
  for (;;) {
    if (m.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), m.random);
    size_t ended = 0;
    std::ostringstream waiting;
    for (const uint64_t i : order) {
      change_over(place[i]);
      m.visit = ++m.visits;
      if (run_block() == Came::to_end)
        ++ended;
      else if (waiting.str().empty())
        waiting << block_name() << " waits at " << m.grid_barrier;
      change_over(place[i]);
    }
    if (ended == order.size()) return;
    if (ended)
      throw std::runtime_error("synccheck: " + waiting.str() + ", which " + std::to_string(ended) +
                               " blocks ended without");
    m.first_visit = m.visits + 1;
    for (const uint64_t i : order) {
      change_over(place[i]);
      m.grid_barrier.arrived = 0;
      pass_barrier();
      change_over(place[i]);
    }
  }
}

// Whether other blocks could have reached for a block's shared memory when it had ended: it has not met them at the
// cluster's barrier after the last time that they did.
void check_end(const Block& b) {
  uint32_t waited = 0;
  for (const Thread& t : b.threads) waited = std::max(waited, t.cluster_waited);
  if (b.reached && b.reached_after >= waited)
    throw std::runtime_error("racecheck: " + b.reached_by + ", and no barrier of the cluster keeps that from ending");
}

// The blocks of a cluster, the first of which is `first` in the grid, from the start to the end of all.
void run_cluster(uint64_t first, size_t dynamic_bytes) {
  std::vector<int> order(m.cluster);
  std::iota(order.begin(), order.end(), 0);
  if (backwards()) std::reverse(order.begin(), order.end());
  m.cluster_arrivals = 0;
  m.cluster_phase = 0;
  m.cluster_gathered = m.cluster_told = {};
  const uint32_t first_block = m.blocks_started + 1;
  for (int r = 0; r < m.cluster; ++r) {
    change_over(r);
    prepare_block(dynamic_bytes);
    start_block(first + r);
    m.rank = r;
    m.first_block = first_block;
    m.visit = ++m.visits;
    change_over(r);
  }
  std::vector<bool> ended(m.cluster);
  for (int left = m.cluster; left > 0;) {
    if (m.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), m.random);
    bool came = false;
    std::string waiting;
    for (const int r : order) {
      if (ended[r]) continue;
      change_over(r);
      const Came to = run_block(!greedy());
      if (to == Came::to_end) ended[r] = true, --left;
      came |= to != Came::nowhere;
      if (waiting.empty() && to == Came::nowhere) waiting = deadlock();
      change_over(r);
    }
    if (!came) throw std::runtime_error(waiting);
  }
  for (int r = 0; r < m.cluster; ++r) check_end(m.group[r]);
}

bool in_arena(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(m.arena) < kSharedArena; }

Region* find(uintptr_t address, size_t bytes) {
  const auto holds = [&](const Region& r) { return address >= r.begin && address + bytes <= r.end; };
  if (in_arena(address) && holds(m.dynamic)) return &m.dynamic;
  for (Region& r : in_arena(address) ? m.shared : m.arrays)
    if (holds(r)) return &r;
  return nullptr;
}

// Whether nothing orders what `t` did before what the running thread does now.
bool races(const Touch& t, const Touch& now, bool shared) {
  if (t.block != now.block && !shared)
    return t.block >= m.first_visit;                          // else before the grid's barrier, or an earlier launch's
  const bool met = t.arrivals < own_thread().cluster_waited;  // at the cluster's barrier
  if (shared && (t.several || t.block != now.block) && t.block >= m.first_block && !met) return true;
  if (t.block != now.block) return false;  // that of an earlier block
  if (t.thread == now.thread || t.epoch != now.epoch || met) return false;
  const int warp = t.thread == kMany ? -1 : t.thread & kWarpOf ? t.thread & ~kWarpOf : t.thread / kWarp;
  return warp != now.thread / kWarp || t.warp_epoch == now.warp_epoch;
}

// `load` after one more.
void add_load(Touch& load, const Touch& now, bool shared) {
  const bool others = shared && (load.several || load.block != now.block) && load.block >= m.first_block &&
                      load.arrivals >= own_thread().cluster_waited;
  const uint32_t arrivals = std::max(load.arrivals, now.arrivals);
  if (load.block != now.block) {
    // of two blocks the earlier one is kept: it races with whatever either may race with
    if (shared || load.block < m.first_visit) load = now;
  } else if (load.epoch != now.epoch || load.thread == now.thread) {
    load = now;
  } else {
    const uint16_t warp = kWarpOf + now.thread / kWarp;
    const bool same = load.thread == warp || load.thread / kWarp == now.thread / kWarp;
    const bool ordered = same && load.warp_epoch != now.warp_epoch;
    load = now;
    if (!ordered) load.thread = same ? warp : kMany;
  }
  if (others) load.several = true, load.arrivals = arrivals;
}

std::string who(const Touch& t, bool shared) {
  if (t.block != (shared ? m.block_number : m.visit)) return "another block";
  return t.thread & kWarpOf ? "others" : name(t.thread);
}

Place copy_into(uintptr_t address, const Touch& store) {
  for (const Copy& c : m.threads[store.thread].copies)
    if (address - reinterpret_cast<uintptr_t>(c.to) < kCopy) return c.place;
  return {"?", 0};
}

Touch touch_now(bool shared) {
  Touch now;
  now.block = shared ? m.block_number : m.visit;
  now.epoch = m.epoch;
  now.warp_epoch = own_warp().epoch;
  now.arrivals = own_thread().cluster_arrived;
  now.thread = static_cast<uint16_t>(m.running);
  return now;
}

// Whether a thread of the running block knows that a copy into block t has landed.
bool has_seen(const Block& t, int thread, const TileCopy& c) {
  if (known(m.threads[thread].known.phases, static_cast<const Mbarrier*>(c.barrier)) > c.phase) return true;
  return &t == &m && std::max(c.barrier->seen[thread], c.barrier->seen_by_all) > c.phase;
}

// Multiplications of warp w of block t that the running thread knows to have been waited for.
uint32_t known_multiplies(const Block& t, const Warp& w) {
  const uint32_t own = &t != &m ? 0 : &w == &own_warp() ? w.waited : w.waited_sync;
  return std::max(own, known(own_thread().known.multiplies, &w));
}

// What the thread can tell others of its block's copies and multiplications.
Knowledge all_known(int thread) {
  Knowledge all = m.threads[thread].known;
  for (const auto& [address, b] : m.barriers) Knowledge::raise(all.phases[&b], std::max(b.seen[thread], b.seen_by_all));
  for (const Warp& w : m.warps)
    Knowledge::raise(all.multiplies[&w], &w == &m.warps[thread / kWarp] ? w.waited : w.waited_sync);
  return all;
}

// The running thread is about to change bytes of block t's that multiplications may still read: each of the
// warpgroup's warps must have waited for them, and told by a barrier, unless it is the thread's own.
template <typename At>
void check_reads(const Block& t, const Granule& granule, size_t offset, const char* does, At place) {
  for (int g = 0; g < kWarpgroups; ++g) {
    if (granule.read[g] == 0) continue;
    for (int i = g * kWarpgroup; i < (g + 1) * kWarpgroup; ++i) {
      const Warp& w = t.warps[i];
      if (known_multiplies(t, w) >= granule.read[g]) continue;
      violate("racecheck", does, " byte ", offset, " of dynamic shared memory, which the multiplication in ",
              where(t.warpgroups[g].multiplies[granule.read[g] - 1].place), " reads; warp ", i,
              w.waited < granule.read[g] ? " has not waited for that" : " has waited for that with no barrier between",
              ", in ", where(place));
    }
  }
}

// Whether the running thread may touch these bytes of block t's dynamic shared memory after what the asynchronous proxy
// did there.
template <typename At>
void check_granules(const Block& t, size_t offset, size_t bytes, bool store, const char* does, At place) {
  for (size_t i = offset / kCopy; i <= (offset + bytes - 1) / kCopy; ++i) {
    const Granule& granule = t.granules[i];
    if (granule.copy) {
      const TileCopy& c = t.tiles[granule.copy - 1];
      if (!c.landed || !has_seen(t, m.running, c))
        violate("racecheck", does, " byte ", i * kCopy, " of dynamic shared memory, into which the copy started by ",
                c.foreign ? "another block" : name(c.thread), " in ", where(c.place),
                c.landed ? " has landed without its waiting for that" : " is under way", ", in ", where(place));
    }
    if (store) check_reads(t, granule, i * kCopy, does, place);
  }
}

// --------------------------------------------------------------------------------------------------------------------
// Dependent launches

std::array<Machine::Word, kPage / kWord>& page_at(uintptr_t address) {
  const uintptr_t number = address / kPage;
  auto& [last, page] = m.last_pages[number % std::size(m.last_pages)];
  if (last != number || !page) last = number, page = &m.pages[number];
  return *page;
}

// An access to global memory, in its launch's order with those before.
template <typename At>
void check_launches(uintptr_t address, size_t bytes, bool store, const Region* r, At place) {
  const char* does = store ? "stores" : "loads";
  const bool ended = own_thread().earlier_ended;
  if (m.follows_unknown && r && !r->frozen && !ended)
    violate("racecheck", does, " ", bytes, " bytes of ", r->name,
            " with no wait_for_earlier_launches before: a launch before this one may be using them, in ", where(place));
  for (uintptr_t at = address / kWord * kWord; at < address + bytes; at += kWord) {
    Machine::Word& word = page_at(at)[at % kPage / kWord];
    const auto unfinished = [&](uint32_t launch) {
      if (ended) return launch >= m.late_from && launch + 1 < m.number;
      return launch >= m.early_from && launch < m.number;
    };
    const bool stored = unfinished(word.stored);
    if (stored || (store && unfinished(word.loaded)))
      violate("racecheck", does, " ", bytes, " bytes that a launch before this one ", stored ? "stores" : "loads",
              ended ? ", whose end the launch between has not waited for, in "
                    : ", with no wait_for_earlier_launches before, in ",
              where(place));
    (store ? word.stored : word.loaded) = m.number;
  }
}

// What that does to the elements of `r`, which is a global array or shared memory of block t.
template <typename At>
void touch(const Block& t, Region& r, uintptr_t address, size_t bytes, Kind kind, At place) {
  const bool store = kind != Kind::load, dynamic = r.shared && &r == &t.dynamic;
  Touch now = touch_now(r.shared);
  now.atomic = kind == Kind::atomic;
  const char* does = store ? "stores to" : "loads";
  const size_t first = (address - r.begin) / r.element, last = (address + bytes - 1 - r.begin) / r.element;
  for (size_t i = first; i <= last; ++i) {
    Cell& c = r.cells[i];
    if (c.store.in_flight && c.store.block == now.block)
      violate("racecheck", does, " element ", i, " of ", r.name, ", into which a copy started by ",
              name(c.store.thread), " in ", where(copy_into(r.begin + i * r.element, c.store)), " is under way, in ",
              where(place));
    const bool two_atomics = now.atomic && c.store.atomic;
    const bool after_store = races(c.store, now, r.shared) && !two_atomics;
    if (after_store || (store && races(c.load, now, r.shared)))
      violate("racecheck", does, " element ", i, " of ", r.name, ", which ",
              who(after_store ? c.store : c.load, r.shared), after_store ? " stored to" : " loaded",
              " with no barrier between, in ", where(place));
    const bool copied = dynamic && t.granules_used && t.granules[i * kDynamicElement / kCopy].copy;
    const bool unwritten = !copied && (r.shared ? c.store.block < m.first_block : c.store.block == 0);
    if (kSeesPlainAccesses && kind != Kind::store && unwritten && r.access == Access::out)
      violate("initcheck", "loads element ", i, " of ", r.name, ", which nobody has stored to, in ", where(place));
    const bool after_own = c.store.block == now.block && c.store.epoch == now.epoch &&
                           c.store.warp_epoch == now.warp_epoch && c.store.thread == now.thread && !c.store.atomic;
    if (!store)
      add_load(c.load, now, r.shared);
    else if (now.atomic && after_own)
      continue;  // others' atomics race with that store still
    else if (!two_atomics || !races(c.store, now, r.shared))
      c.store = now;
    // Another block's earlier one is kept: it races with whatever either may race with.
    else if (c.store.block == now.block)
      c.store.thread = kMany;
  }
}

// One load or store of `bytes` bytes at `address`, made at `place`: a Place or the code behind the access. Gives the
// region, if any is watched there.
template <typename At>
Region* check(const void* pointer, size_t bytes, Kind kind, At place) {
  const bool store = kind != Kind::load;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Region* r = find(address, bytes);
  if (!in_arena(address) && !(r && r->parameters)) check_launches(address, bytes, store, r, place);
  if (!r) {
    if (!m.arrays_named && !in_arena(address)) return nullptr;
    std::ostringstream near;
    const auto measure = [&](const Region& a) {
      if (address + 4096 > a.begin && address < a.end + 4096)
        near << ", at byte " << static_cast<ptrdiff_t>(address - a.begin) << " of the " << a.end - a.begin << " of "
             << a.name;
    };
    for (const Region& a : in_arena(address) ? m.shared : m.arrays) measure(a);
    if (in_arena(address) && m.dynamic.end > m.dynamic.begin) measure(m.dynamic);
    violate("memcheck", store ? "stores " : "loads ", bytes, " bytes outside every array", near.str(), ", in ",
            where(place));
  }
  if (store && r->access == Access::in) violate("memcheck", "stores to the input ", r->name, ", in ", where(place));
  if (r->cells.empty()) return r;

  const char* does = store ? "stores to" : "loads";
  const bool dynamic = r == &m.dynamic;
  if (dynamic) {
    if (m.granules_used) check_granules(m, address - r->begin, bytes, store, does, place);
    m.generic_epoch = m.epoch;
    m.generic_stores |= store;
  }
  touch(m, *r, address, bytes, kind, place);
  return r;
}
void note_access(const void* p, size_t bytes, Kind kind, const void* code) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const Region& parameters = m.arrays.back();
  if (in_arena(address) || (address >= parameters.begin && address < parameters.end)) return;
  Accesses& a = m.recorded.accesses[{kind, reinterpret_cast<uintptr_t>(code)}];
  a.by_thread.resize(m.threads.size());
  ++a.by_thread[m.running];
  ++a.times;
  a.bytes += bytes;
  a.lowest = std::min(a.lowest, address);
  a.end = std::max(a.end, address + bytes);
}

// From the compiler's call before an access. Most are to the thread's own stack.
inline void check_access(void* p, size_t bytes, Kind kind, const void* code) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - m.stack;
  if (offset < kStack && bytes <= kStack - offset) return;
  if (m.running < 0) return;
  if (m.recording.on) note_access(p, bytes, kind, code);
  check(p, bytes, kind, code);
}

void mark_in_flight(Region* r, const char* to, bool in_flight) {
  const size_t first = reinterpret_cast<uintptr_t>(to) - r->begin, last = first + kCopy - 1;
  for (size_t i = first / r->element; i <= last / r->element; ++i) r->cells[i].store.in_flight = in_flight;
}

void move_bytes(const Copy& c) {
  memcpy(c.to, c.from, c.bytes);
  memset(c.to + c.bytes, 0, kCopy - c.bytes);
}

void land(const Copy& c) {
  mark_in_flight(find(reinterpret_cast<uintptr_t>(c.to), kCopy), c.to, false);
  check(c.to, kCopy, Kind::store, c.place);
  if (c.bytes) check(c.from, c.bytes, Kind::load, c.place);
  if (m.async == Async::lazy) move_bytes(c);
}

float from_half(uint16_t bits, Half type) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  if (type == Half::f16) {
    const bool finite = (bits & 0x7C00) != 0x7C00;
    wide = uint32_t(bits & 0x7FFF) << 13;  // the exponent is 112 too small
    memcpy(&value, &wide, sizeof value);
    if (finite) value *= 0x1p112f;
    memcpy(&wide, &value, sizeof wide);
    wide |= uint32_t(bits & 0x8000) << 16 | (finite ? 0 : 0x7F800000);
  }
  memcpy(&value, &wide, sizeof value);
  return value;
}

// --------------------------------------------------------------------------------------------------------------------
// Hopper

constexpr const char* kBarrierWait = "barrier_wait";
constexpr const char* kWarpgroupWait = "warpgroup_wait";
constexpr uint64_t kBarrierBits = 0x7265697272616221;  // what the emulator keeps in an mbarrier's own memory

// An access to an mbarrier's own memory, which tiles and operands are kept from otherwise.
void check_barrier(uint64_t* p, Kind kind, Place place) {
  const auto [stores, epoch] = std::pair(m.generic_stores, m.generic_epoch);
  check(p, sizeof *p, kind, place);
  m.generic_stores = stores, m.generic_epoch = epoch;
}

// The mbarrier there, for an instruction other than its initialisation. Its operations are atomic.
Mbarrier& find_barrier(uint64_t* p, const char* what, Place place) {
  const auto found = m.barriers.find(reinterpret_cast<uintptr_t>(p));
  if (found == m.barriers.end())
    violate("initcheck", "is at ", what, " for a barrier that nobody has initialised, in ", where(place));
  check_barrier(p, Kind::atomic, place);
  if (*p != kBarrierBits)
    violate("memcheck", "is at ", what, " for a barrier that has been overwritten, in ", where(place));
  return found->second;
}

void complete(Mbarrier& b, Place place) {
  if (b.pending) return;
  if (b.bytes < 0) violate("synccheck", "brings a barrier ", -b.bytes, " bytes more than expected, in ", where(place));
  if (b.bytes) return;
  ++b.phase;
  b.pending = b.arrivals;
  b.told = b.gathered;
  const auto wake = [&](Block& of) {
    for (Thread& t : of.threads)
      if (t.barrier == &b) t.state = Thread::ready, t.barrier = nullptr;
  };
  wake(m);
  for (int r = 0; m.cluster > 1 && r < m.cluster; ++r) wake(m.group[r]);
}

// Calls use(row of the box, first column inside the array, columns, their address) for the rows that the array has a
// part of.
template <typename Use>
void for_rows_inside(const TileCopy& c, const Use& use) {
  const int64_t columns = static_cast<int64_t>(c.map.columns), rows = static_cast<int64_t>(c.map.rows);
  const int64_t first = std::max(c.column, 0), last = std::min<int64_t>(columns, int64_t(c.column) + c.map.box_columns);
  if (first >= last) return;
  for (int64_t r = 0; r < c.map.box_rows; ++r)
    if (c.row + r >= 0 && c.row + r < rows)
      use(r, first - c.column, last - first, c.map.base + (c.row + r) * c.map.stride + first * 2);
}

void check_source(const TileCopy& c) {
  for_rows_inside(
      c, [&](int64_t, int64_t, int64_t columns, const char* from) { check(from, columns * 2, Kind::load, c.place); });
}

void land(TileCopy& c) {
  if (!c.foreign) check_source(c);
  if (c.barrier->phase != c.phase)
    violate("synccheck", "started a copy that lands when its barrier's phase has been completed without it, in ",
            where(c.place));
  memset(c.to, 0, c.map.box_rows * kTileRow);
  for_rows_inside(c, [&](int64_t r, int64_t column, int64_t columns, const char* from) {
    char row[kTileRow] = {};
    memcpy(row + column * 2, from, columns * 2);
    for (size_t chunk = 0; chunk < kTileRow / kCopy; ++chunk)
      memcpy(c.to + r * kTileRow + (chunk ^ r % 8) * kCopy, row + chunk * kCopy, kCopy);
  });
  c.landed = true;
  c.barrier->bytes -= c.map.box_rows * kTileRow;
  complete(*c.barrier, c.place);
}

// The threads of four warps issue this instruction together.
void check_warpgroup(const char* what, Place place) {
  const int first = m.running / kWarp / kWarpgroup * kWarpgroup, warps = static_cast<int>(m.warps.size()) - first;
  if (warps < kWarpgroup)
    violate("synccheck", "is at ", what, " in ", where(place), ", but its warpgroup has ", warps, " warps");
}

// Calls use(row, first, address in shared memory) for the 16 bytes that hold elements (row, first .. first + 7) of an
// operand [rows, 16], or [16, rows] transposed, in whose rows of 128 bytes they are neighbours.
template <typename Use>
void for_chunks(uint64_t descriptor, int rows, bool transposed, const Use& use) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto swizzled = [](uint32_t address) { return address ^ (address >> 7 & 7) << 4; };
  if (transposed) {
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < rows; n += 8)
        use(k, n, swizzled(start + n / 64 * leading + k / 8 * stride + k % 8 * kTileRow + n % 64 * 2));
  } else {
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < 16; k += 8) use(r, k, swizzled(start + r / 8 * stride + r % 8 * kTileRow + k * 2));
  }
}

// What one multiplication reads, before it is known to a warp other than the running one.
void check_operand(Multiply& x, uint64_t descriptor, int rows, bool transposed) {
  const auto wrong = [&](const char* kind, uint32_t address, const auto&... why) {
    violate(kind, "multiplies byte ", static_cast<int64_t>(address) - static_cast<int64_t>(kDynamicOffset),
            " of dynamic shared memory, ", why..., ", in ", where(x.place));
  };
  if (descriptor >> 62 != 1 || descriptor >> 46 & 0xFFFF || descriptor >> 30 & 3 || descriptor >> 14 & 3)
    violate("memcheck", "multiplies by a matrix descriptor of another layout than the 128-byte swizzle, in ",
            where(x.place));
  const int group = m.running / kWarp / kWarpgroup;
  const uint32_t number = static_cast<uint32_t>(own_warpgroup().multiplies.size());
  const size_t bytes = m.dynamic.end - m.dynamic.begin;
  for_chunks(descriptor, rows, transposed, [&](int, int, uint32_t address) {
    if (address < kDynamicOffset || address + kCopy > kDynamicOffset + bytes)
      wrong("memcheck", address, "which has ", bytes);
    Granule& granule = m.granules[(address - kDynamicOffset) / kCopy];
    const Cell* cells = &m.dynamic.cells[(address - kDynamicOffset) / kDynamicElement];
    for (size_t i = 0; m.generic_stores && i < kCopy / kDynamicElement; ++i)
      if (cells[i].store.block >= m.first_block)
        wrong("racecheck", address, "which ", who(cells[i].store, true),
              " stored to with no fence towards the asynchronous proxy");
    if (!granule.copy) wrong("initcheck", address, "which nobody has copied to");
    const TileCopy& c = m.tiles[granule.copy - 1];
    if (!c.landed) wrong("racecheck", address, "into which the copy started in ", where(c.place), " is under way");
    if (std::find(x.copies.rbegin(), x.copies.rend(), granule.copy - 1) == x.copies.rend())
      x.copies.push_back(granule.copy - 1);
    granule.read[group] = number;
  });
}

constexpr uint32_t kTaken = 0xFFBFFFFF;  // a NaN that any arithmetic changes

void refuse_registers(Place place) {
  violate("racecheck", "uses registers otherwise while a multiplication adds to them, before ", where(place));
}

void check_registers(const Accumulators& to, Place place) {
  for (const float* d : to.d)
    for (int i = 0; i < 4 * to.blocks; ++i)
      if (memcmp(d + i, &kTaken, sizeof kTaken)) refuse_registers(place);
}

// The warp's registers that its lanes add to, taken from them until it has waited.
Accumulators& take_registers(Warp& w, int blocks, Place place) {
  for (Accumulators& to : w.accumulators) {
    if (to.d[0] != w.lanes[0].sum) continue;
    for (int l = 0; l < kWarp; ++l)
      if (to.d[l] != w.lanes[l].sum || to.blocks != blocks) refuse_registers(place);
    check_registers(to, place);
    return to;
  }
  Accumulators& to = w.accumulators.emplace_back();
  to.blocks = blocks;
  to.sum.resize(16 * 8 * blocks);
  for (int l = 0; l < kWarp; ++l) {
    to.d[l] = w.lanes[l].sum;
    for (int j = 0; j < blocks; ++j)
      for (int i = 0; i < 4; ++i)
        to.sum[(l / 4 + i / 2 * 8) * 8 * blocks + 8 * j + 2 * (l % 4) + i % 2] = to.d[l][4 * j + i];
    for (int i = 0; i < 4 * blocks; ++i) memcpy(to.d[l] + i, &kTaken, sizeof kTaken);
  }
  return to;
}

// Registers whose last multiplication is before `end` are the warp's again.
void give_registers(Warp& w, uint32_t end, Place place) {
  for (auto to = w.accumulators.begin(); to != w.accumulators.end();) {
    if (to->last > end) {
      ++to;
      continue;
    }
    check_registers(*to, place);
    for (int l = 0; l < kWarp; ++l)
      for (int j = 0; j < to->blocks; ++j)
        for (int i = 0; i < 4; ++i)
          to->d[l][4 * j + i] = to->sum[(l / 4 + i / 2 * 8) * 8 * to->blocks + 8 * j + 2 * (l % 4) + i % 2];
    to = w.accumulators.erase(to);
  }
}

void multiply(const Multiply& x) {
  if (m.recording.on) return;
  constexpr int kRows = 16 * kWarpgroup, kMostColumns = 256;
  static float A[kRows][16], B[16][kMostColumns];
  const int columns = 8 * x.blocks;
  const auto element = [&](uint32_t address, int i) {
    uint16_t bits;
    memcpy(&bits, m.arena + address + 2 * i, sizeof bits);
    return from_half(bits, x.type);
  };
  for_chunks(x.a, kRows, x.a_transposed, [&](int row, int first, uint32_t address) {
    for (int i = 0; i < 8; ++i) (x.a_transposed ? A[first + i][row] : A[row][first + i]) = element(address, i);
  });
  for_chunks(x.b, columns, x.transposed, [&](int row, int first, uint32_t address) {
    for (int i = 0; i < 8; ++i) (x.transposed ? B[row][first + i] : B[first + i][row]) = element(address, i);
  });
  for (int r = 0; r < kRows; ++r) {
    float sum[kMostColumns] = {}, *to = x.to[r / 16]->sum.data() + r % 16 * columns;
    for (int k = 0; k < 16; ++k) {
      const float a = A[r][k], *b = B[k];
      for (int c = 0; c < columns; ++c) sum[c] += a * b[c];
    }
    for (int c = 0; c < columns; ++c) to[c] += sum[c];
  }
}

// Runs the warpgroup's first `groups` groups.
void run_groups(Warpgroup& g, uint32_t groups) {
  while (g.done < g.ends[groups - 1]) multiply(g.multiplies[g.done++]);
}

// Groups that all four warps have committed.
uint32_t committed(int warpgroup) {
  uint32_t least = UINT32_MAX;
  for (int i = 0; i < kWarpgroup; ++i) least = std::min(least, m.warps[warpgroup * kWarpgroup + i].committed);
  return least;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill) {
  ++m.counts.maps;
  const bool half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!half || rank != 2 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_NOT_SUPPORTED;  // here, not by CUDA
  const auto aligned = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  bool good = map && base && sizes && strides && box && steps && aligned(map, 64) && aligned(base, 16);
  good = good && strides[0] % 16 == 0 && strides[0] < uint64_t(1) << 40 && strides[0] / 2 >= sizes[0];
  for (int i = 0; good && i < 2; ++i)
    good = sizes[i] > 0 && sizes[i] <= uint64_t(1) << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
  good = good && box[0] * 2 % 16 == 0 && (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= kTileRow);
  if (!good || promotion < CU_TENSOR_MAP_L2_PROMOTION_NONE || promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B)
    return CUDA_ERROR_INVALID_VALUE;
  const TiledMap tiled{kMapMagic, static_cast<const char*>(base), sizes[0], sizes[1], strides[0], box[0], box[1],
                       swizzle};
  memset(map, 0, sizeof *map);
  memcpy(map, &tiled, sizeof tiled);
  return CUDA_SUCCESS;
}

}  // namespace

void set_schedule(Schedule schedule, unsigned seed) {
  m.schedule = schedule;
  m.random.seed(seed);
}

void set_async(Async async) { m.async = async; }

void set_device(int device) { m.device = device; }
void refuse(int attributes, bool together) {
  m.refused = attributes;
  m.refused_together = together;
  ijckd::refused_features = 0;
}
int refused() { return ijckd::refused_features; }
int device() { return m.device; }
int capture_mode() { return m.capture_mode; }
int last_error() { return m.last_error; }

cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) m.last_error = error;
  return error;
}

const Counts& counts() { return m.counts; }
void clear_counts() { m.counts = {}; }

Arrays::~Arrays() {
  for (const Copy& c : copies_) {
    if (c.to) memcpy(c.to, c.data, c.bytes);
    free(c.block);
  }
  m.arrays.clear();
  m.arrays_named = m.arrays_launched = false;
}

void* Arrays::add(const char* name, const void* data, size_t bytes, size_t element, Access access) {
  char* block = static_cast<char*>(aligned_alloc(kDistance, (bytes + 4 * kDistance - 1) / kDistance * kDistance));
  if (!block) throw std::bad_alloc();
  void* copy = block + kDistance + reinterpret_cast<uintptr_t>(data) % kCopy;  // no better aligned than the caller's
  memcpy(copy, data, bytes);
  const bool in = access == Access::in || access == Access::frozen;
  copies_.push_back({block, copy, in ? nullptr : const_cast<void*>(data), bytes});
  Region r;
  r.name = name;
  r.begin = reinterpret_cast<uintptr_t>(copy);
  r.end = r.begin + bytes;
  r.element = element;
  r.access = in ? Access::in : access;
  r.frozen = access == Access::frozen;
  if (!in) r.cells.resize(bytes / element);  // nothing can be wrong with a load of an input
  m.arrays.push_back(std::move(r));
  m.arrays_named = true;
  return copy;
}

uint3 thread_index() { return m.threads[m.running].index; }
uint3 block_index() { return m.block_index; }
dim3 block_dim() { return m.block; }
dim3 grid_dim() { return m.grid; }

// The running thread comes to its block's barrier or to the grid's; while it waits there nobody may wait at the other.
static void arrive(Meeting& b, const Meeting& other, const char* what, Place place) {
  const auto lacks = [&](const auto&... why) {
    violate("synccheck", "is at ", what, " in ", where(place), ", ", why...);
  };
  if (m.returned) lacks("but ", m.returned, " threads of the block have returned");
  if (other.arrived) lacks("others are at ", other);
  if (own_warp().meeting.arrived) lacks("others of its warp are at ", own_warp().meeting);
  if (b.arrived && !b.is_at(what, 0, place)) lacks("others are at ", b);
  b.what = what;
  b.place = place;
  ++b.arrived;
  ++own_warp().at_barrier;
}

void barrier(Place place) {
  constexpr const char* kWhat = "the barrier";
  arrive(m.barrier, m.grid_barrier, kWhat, place);
  if (m.barrier.arrived < static_cast<int>(m.threads.size())) return wait(kWhat, place);
  m.barrier.arrived = 0;
  pass_barrier();
}

void grid_barrier(Place place) {
  constexpr const char* kWhat = "the grid's barrier";
  if (!m.cooperative)
    violate("synccheck", "is at ", kWhat, " in ", where(place), ", but the launch is not cooperative");
  arrive(m.grid_barrier, m.barrier, kWhat, place);
  wait(kWhat, place);
}

uint32_t shared_address(const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (!in_arena(address)) violate("memcheck", "takes an address that is not in shared memory for one that is");
  return static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(m.arena));
}

void sync_warp(Place place) {
  meet_warp("__syncwarp", 0, place, {}, [](Warp& w) {
    ++w.epoch;
    Thread* const lanes = &m.threads[m.running / kWarp * kWarp];
    const bool ended = std::any_of(lanes, lanes + kWarp, [](const Thread& t) { return t.earlier_ended; });
    for (int l = 0; l < kWarp; ++l) lanes[l].earlier_ended = ended;
  });
}

uint32_t shuffle_xor(uint32_t bits, int mask, Place place) {
  if (mask < 0 || mask >= kWarp) violate("memcheck", "shuffles with lane mask ", mask, ", in ", where(place));
  Lane lane{};
  lane.bits = bits;
  // the value as it is handed out: the other lane may be at its next shuffle by the time this one goes on
  meet_warp("shuffle_xor", mask, place, lane, [mask](Warp& w) {
    uint32_t out[kWarp];
    for (int l = 0; l < kWarp; ++l) out[l] = w.lanes[l ^ mask].bits;
    for (int l = 0; l < kWarp; ++l) w.lanes[l].bits = out[l];
  });
  return own_warp().lanes[m.running % kWarp].bits;
}

void load_matrix_x4(uint32_t* r, const void* row, bool transposed, Place place) {
  if (reinterpret_cast<uintptr_t>(row) % kCopy)
    violate("memcheck", "loads a matrix row that is not 16-byte aligned, in ", where(place));
  if (!in_arena(reinterpret_cast<uintptr_t>(row)))
    violate("memcheck", "loads a matrix row outside shared memory, in ", where(place));
  check(row, kCopy, Kind::load, place);
  Lane lane{};
  lane.row = row;
  lane.fragments = r;
  meet_warp(transposed ? "load_matrix_x4_transposed" : "load_matrix_x4", 0, place, lane, [transposed](Warp& w) {
    ++m.counts.load_matrix;
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      int users[8] = {};  // of each 16 bytes of the 128 that one access reads
      for (int j = 0; j < 8; ++j) {
        const void* address = w.lanes[8 * i + j].row;
        memcpy(matrix[j], address, kCopy);
        ++users[reinterpret_cast<uintptr_t>(address) / kCopy % 8];
      }
      m.counts.bank_conflicts += *std::max_element(users, users + 8) - 1;
      for (int l = 0; l < kWarp; ++l) {
        const int g = l / 4, t = 2 * (l % 4);
        const uint32_t low = transposed ? matrix[t][g] : matrix[g][t],
                       high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
        w.lanes[l].fragments[i] = low | high << 16;
      }
    }
  });
}

void multiply_add_16x8x16(float* d, const uint32_t* a, const uint32_t* b, Half type, Place place) {
  Lane lane{};
  lane.sum = d;
  lane.a = a;
  lane.b = b;
  meet_warp("multiply_add_16x8x16", static_cast<int>(type), place, lane, [type](Warp& w) {
    ++m.counts.multiply_add;
    if (m.recording.on) return;
    float A[16][16], B[16][8], D[16][8] = {};
    const auto low = [&](uint32_t bits) { return from_half(static_cast<uint16_t>(bits), type); };
    const auto high = [&](uint32_t bits) { return from_half(static_cast<uint16_t>(bits >> 16), type); };
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, t = 2 * (l % 4);
      for (int i = 0; i < 4; ++i) {
        float* to = &A[g + i % 2 * 8][t + i / 2 * 8];
        to[0] = low(w.lanes[l].a[i]);
        to[1] = high(w.lanes[l].a[i]);
      }
      for (int i = 0; i < 2; ++i) {
        B[t + 8 * i][g] = low(w.lanes[l].b[i]);
        B[t + 8 * i + 1][g] = high(w.lanes[l].b[i]);
      }
    }
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 16; ++k)
        for (int c = 0; c < 8; ++c) D[r][c] += A[r][k] * B[k][c];
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) w.lanes[l].sum[i] += D[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  });
}

void copy_async16(void* to, const void* from, int bytes, Place place) {
  const uintptr_t source = reinterpret_cast<uintptr_t>(from), destination = reinterpret_cast<uintptr_t>(to);
  const auto refuse = [&](const auto&... why) { violate("memcheck", why..., ", in ", where(place)); };
  if (bytes < 0 || bytes > static_cast<int>(kCopy)) refuse("copies ", bytes, " bytes of 16");
  if (destination % kCopy) refuse("copies to an address that is not 16-byte aligned");
  if (source % kCopy) refuse("copies from an address that is not 16-byte aligned");
  if (!in_arena(destination)) refuse("copies to outside shared memory");
  if (in_arena(source)) refuse("copies from shared memory");
  if (m.arrays_named && !find(source, 1)) refuse("copies from outside every array");
  Thread& t = m.threads[m.running];
  const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), static_cast<size_t>(bytes), place, t.groups};
  if (bytes) check(from, bytes, Kind::load, place);
  if (bytes && m.recording.on) note_access(from, bytes, Kind::copy, __builtin_return_address(0));
  Region* r = check(to, kCopy, Kind::store, place);
  mark_in_flight(r, copy.to, true);
  t.copies.push_back(copy);
  ++m.counts.copies;
  if (m.async == Async::lazy)
    memset(to, 0xFF, kCopy);
  else
    move_bytes(copy);
}

void copy_async_commit() { ++m.threads[m.running].groups; }

void copy_async_wait(int pending) {
  Thread& t = m.threads[m.running];
  size_t landed = 0;
  while (landed < t.copies.size() && t.copies[landed].group + pending < t.groups) land(t.copies[landed++]);
  t.copies.erase(t.copies.begin(), t.copies.begin() + landed);
}

void barrier_init(uint64_t* barrier, int arrivals, Place place) {
  const auto refuse = [&](const auto&... why) { violate("memcheck", why..., ", in ", where(place)); };
  if (!in_arena(reinterpret_cast<uintptr_t>(barrier))) refuse("initialises a barrier outside shared memory");
  if (reinterpret_cast<uintptr_t>(barrier) % sizeof *barrier)
    refuse("initialises a barrier that is not 8-byte aligned");
  if (arrivals < 1 || arrivals > kMostArrivals) refuse("initialises a barrier for ", arrivals, " arrivals");
  if (m.barriers.count(reinterpret_cast<uintptr_t>(barrier))) refuse("initialises a barrier again");
  check_barrier(barrier, Kind::store, place);
  *barrier = kBarrierBits;
  Mbarrier& b = m.barriers[reinterpret_cast<uintptr_t>(barrier)];
  b.arrivals = b.pending = arrivals;
  b.initialiser = m.running;
  b.initialised = own_thread().cluster_arrived;
  b.seen.resize(m.threads.size());
}

void barrier_init_fence() {
  for (auto& [address, b] : m.barriers) b.fenced |= b.initialiser == m.running;
}

static void arrive_at(Mbarrier& b, int bytes, Place place) {
  if (b.pending == 0)
    violate("synccheck", "arrives at a barrier once more than it was initialised for, in ", where(place));
  b.gathered.add(all_known(m.running));
  --b.pending;
  b.bytes += bytes;
  complete(b, place);
}

void barrier_expect(uint64_t* barrier, int bytes, Place place) {
  Mbarrier& b = find_barrier(barrier, "barrier_expect", place);
  if (bytes < 0 || b.bytes + bytes > kMostBytes)
    violate("memcheck", "expects ", bytes, " more bytes, in ", where(place));
  arrive_at(b, bytes, place);
}

void barrier_arrive(uint64_t* barrier, Place place) {
  arrive_at(find_barrier(barrier, "barrier_arrive", place), 0, place);
}

void barrier_wait(uint64_t* barrier, uint32_t parity, Place place) {
  Mbarrier& b = find_barrier(barrier, kBarrierWait, place);
  if (parity > 1) violate("memcheck", "waits for parity ", parity, ", in ", where(place));
  while (b.phase % 2 == parity) {
    m.threads[m.running].barrier = &b;
    wait(kBarrierWait, place);
  }
  b.seen[m.running] = b.phase;
  b.seen_by_one = std::max(b.seen_by_one, b.phase);
  own_thread().known.add(b.told);
}

// Starts a copy to `to` in dynamic shared memory of block t, for its barrier b.
static void start_tile(Block& t, char* to, const TiledMap& map, Mbarrier& b, int column, int row, Place place) {
  const auto refuse = [&](const auto&... why) { violate("memcheck", why..., ", in ", where(place)); };
  if (!b.fenced)
    violate("racecheck", "copies a tile for a barrier with no barrier_init_fence since its barrier_init, in ",
            where(place));
  const TileCopy copy{to, map, column, row, &b, b.phase, m.running, &t != &m, place, false};
  if (map.magic != kMapMagic) refuse("copies a tile by a map that was not encoded");
  if (map.swizzle != CU_TENSOR_MAP_SWIZZLE_128B || map.box_columns * 2 != kTileRow)
    refuse("copies a tile by a map whose box has no rows of 128 bytes with the 128-byte swizzle");
  const uintptr_t address = reinterpret_cast<uintptr_t>(to);
  const size_t bytes = map.box_rows * kTileRow, size = t.dynamic.end - t.dynamic.begin,
               offset = address - t.dynamic.begin;
  if (address < t.dynamic.begin || offset + bytes > size)
    refuse("copies a tile of ", bytes, " bytes to byte ", static_cast<ptrdiff_t>(offset), " of the ", size,
           " of dynamic shared memory");
  if (offset % kTileAlign) refuse("copies a tile to an address that is not 1024-byte aligned");
  if (m.dynamic_align < kTileAlign)
    refuse("copies a tile to dynamic shared memory that is declared aligned to ", m.dynamic_align, " bytes");
  const auto overlapped = t.barriers.lower_bound(address);
  if (overlapped != t.barriers.end() && overlapped->first < address + bytes) refuse("copies a tile over a barrier");

  constexpr const char* kDoes = "copies a tile to";
  t.granules_used = true;
  check_granules(t, offset, bytes, true, kDoes, place);
  const Touch now = touch_now(true);
  if (t.generic_stores || t.reached_by_loads || t.generic_epoch == t.epoch)
    for (size_t i = offset / kDynamicElement; i < (offset + bytes) / kDynamicElement; ++i) {
      const Cell& c = t.dynamic.cells[i];
      const bool stored = c.store.block >= m.first_block;
      if (stored || races(c.load, now, true))
        violate("racecheck", kDoes, " element ", i, " of dynamic shared memory, which ",
                who(stored ? c.store : c.load, true),
                stored ? " stored to with no fence towards the asynchronous proxy" : " loaded with no barrier between",
                ", in ", where(place));
    }
  check_source(copy);
  t.tiles.push_back(copy);
  const uint32_t number = static_cast<uint32_t>(t.tiles.size());
  for (size_t i = 0; i < bytes / kCopy; ++i) t.granules[offset / kCopy + i].copy = number;
  ++m.counts.tile_copies;
  if (m.recording.on)
    t.recorded.tiles[{reinterpret_cast<uintptr_t>(copy.map.base), copy.map.rows * copy.map.stride, bytes,
                      m.recording.receivers}] += bytes;
  if (m.async == Async::lazy) {
    memset(to, 0xFF, bytes);
    t.under_way.push_back(number - 1);
  } else {
    land(t.tiles.back());
  }
}

static TiledMap read_map(const CUtensorMap& map, Place place) {
  if (reinterpret_cast<uintptr_t>(&map) % 64)
    violate("memcheck", "copies a tile by a map that is not 64-byte aligned, in ", where(place));
  TiledMap tiled;
  memcpy(&tiled, &map, sizeof tiled);
  return tiled;
}

void load_tile(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, Place place) {
  Mbarrier& b = find_barrier(barrier, "load_tile", place);
  start_tile(m, static_cast<char*>(to), read_map(map, place), b, column, row, place);
}

// --------------------------------------------------------------------------------------------------------------------
// Clusters and dependent launches

constexpr const char* kClusterWait = "cluster_wait";

// The running thread is about to use shared memory of another block of the cluster.
static void reach(Block& t, const char* does, Place place) {
  const auto wrong = [&](const char* why) {
    violate("racecheck", does, " shared memory of block ", t.rank, " of its cluster, ", why, ", in ", where(place));
  };
  if (own_thread().cluster_waited == 0) wrong("which may not have started: no barrier of the cluster before");
  if (t.returned == static_cast<int>(t.threads.size())) wrong("which has ended");
  t.reached = true;
  if (own_thread().cluster_arrived < t.reached_after) return;
  t.reached_after = own_thread().cluster_arrived;
  t.reached_by = name(m.running) + " of " + block_name() + " " + does + " shared memory of block " +
                 std::to_string(t.rank) + " of its cluster in " + where(place);
}

// The barrier of block t that lies where `offset` says.
static Mbarrier& barrier_of(Block& t, size_t offset, const char* what, Place place) {
  const auto found = t.barriers.find(reinterpret_cast<uintptr_t>(t.arena) + offset);
  if (found == t.barriers.end())
    violate("initcheck", "is at ", what, " for a barrier of block ", t.rank, " that nobody has initialised, in ",
            where(place));
  Mbarrier& b = found->second;
  if (!b.fenced)
    violate("racecheck", "is at ", what, " for a barrier of another block with no barrier_init_fence, in ",
            where(place));
  if (b.initialised >= own_thread().cluster_waited)
    violate("racecheck", "is at ", what, " for a barrier of another block, with no barrier of the cluster since its ",
            "barrier_init, in ", where(place));
  return b;
}

void load_tile_to_blocks(void* to, const CUtensorMap& map, uint64_t* barrier, int column, int row, uint16_t blocks,
                         Place place) {
  constexpr const char* kWhat = "load_tile_to_blocks";
  if (blocks == 0 || blocks >> m.cluster)
    violate("memcheck", "copies a tile to blocks ", blocks, " of a cluster of ", m.cluster, ", in ", where(place));
  const TiledMap tiled = read_map(map, place);
  const uint32_t offset = shared_address(to), barrier_offset = shared_address(barrier);
  m.recording.receivers = __builtin_popcount(blocks);
  for (int r = 0; r < m.cluster; ++r) {
    if (!(blocks >> r & 1)) continue;
    Block& t = block_of(r);
    if (&t == &m) {
      start_tile(m, static_cast<char*>(to), tiled, find_barrier(barrier, kWhat, place), column, row, place);
      continue;
    }
    reach(t, "copies a tile to", place);
    start_tile(t, t.arena + offset, tiled, barrier_of(t, barrier_offset, kWhat, place), column, row, place);
  }
  m.recording.receivers = 1;
}

void prefetch_map(const CUtensorMap& map, Place place) { read_map(map, place); }

int cluster_rank() { return m.rank; }

void cluster_arrive(Place place) {
  meet_warp("cluster_arrive", 0, place, {}, [&](Warp&) {
    const int first = m.running / kWarp * kWarp;
    for (int i = first; i < first + kWarp; ++i) {
      Thread& t = m.threads[i];
      if (t.cluster_arrived > t.cluster_waited)
        violate("synccheck", "arrives at the cluster's barrier again before it has waited, in ", where(place));
      ++t.cluster_arrived;
      m.cluster_gathered.add(all_known(i));
    }
    m.cluster_arrivals += kWarp;
    if (m.cluster_arrivals < m.cluster * static_cast<int>(m.threads.size())) return;
    m.cluster_arrivals = 0;
    ++m.cluster_phase;
    m.cluster_told = m.cluster_gathered;
    for (int r = 0; r < m.cluster; ++r)
      for (Thread& t : block_of(r).threads)
        if (t.state == Thread::waiting && t.what == kClusterWait) t.state = Thread::ready;
  });
}

void cluster_wait(Place place) {
  meet_warp("the warp's part of cluster_wait", 0, place, {}, [](Warp&) {});
  Thread& t = own_thread();
  if (t.cluster_arrived == t.cluster_waited)
    violate("synccheck", "waits for the cluster's barrier before it has arrived there, in ", where(place));
  while (m.cluster_phase < t.cluster_arrived) wait(kClusterWait, place);
  t.cluster_waited = t.cluster_arrived;
  t.known.add(m.cluster_told);
}

uint32_t address_in_block(const void* p, int rank, Place place) {
  const uint32_t offset = shared_address(p);
  if (rank < 0 || rank >= m.cluster)
    violate("memcheck", "asks for an address in block ", rank, " of a cluster of ", m.cluster, ", in ", where(place));
  const size_t size = m.dynamic.end - m.dynamic.begin;
  if (offset < kDynamicOffset || offset - kDynamicOffset >= size)  // static arrays need not lie at equal places here
    violate("memcheck", "asks for an address in another block outside dynamic shared memory, in ", where(place));
  return static_cast<uint32_t>(rank + 1) << kRankBit | offset;
}

// The block whose address that is, and where it has it.
static std::pair<Block&, char*> place_of(uint32_t address) {
  const int rank = static_cast<int>(address >> kRankBit) - 1;
  Block& t = rank < 0 ? m : block_of(rank);
  return {t, t.arena + (address & ((1u << kRankBit) - 1))};
}

static char* reached_place(uint32_t address, size_t bytes, Kind kind, Place place) {
  const auto [t, p] = place_of(address);
  const bool store = kind == Kind::store;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % bytes)
    violate("memcheck", store ? "stores to" : "loads", " an address in another block that is not ", bytes,
            "-byte aligned, in ", where(place));
  if (at < t.dynamic.begin || at + bytes > t.dynamic.end)
    violate("memcheck", store ? "stores " : "loads ", bytes, " bytes outside the dynamic shared memory of a block, in ",
            where(place));
  if (&t == &m) {
    check(p, bytes, kind, place);
    return p;
  }
  reach(t, store ? "stores to" : "loads", place);
  if (t.granules_used) check_granules(t, at - t.dynamic.begin, bytes, store, store ? "stores to" : "loads", place);
  t.generic_stores |= store;
  t.reached_by_loads |= !store;
  touch(t, t.dynamic, at, bytes, kind, place);
  return p;
}

void load_from_block(void* to, uint32_t address, size_t bytes, Place place) {
  memcpy(to, reached_place(address, bytes, Kind::load, place), bytes);
}

void store_to_block(uint32_t address, const void* from, size_t bytes, Place place) {
  memcpy(reached_place(address, bytes, Kind::store, place), from, bytes);
}

void barrier_arrive_in_block(uint32_t address, Place place) {
  constexpr const char* kWhat = "barrier_arrive_in_block";
  const auto [t, p] = place_of(address);
  if (&t == &m) return arrive_at(find_barrier(reinterpret_cast<uint64_t*>(p), kWhat, place), 0, place);
  reach(t, "arrives at a barrier in", place);
  arrive_at(barrier_of(t, p - t.arena, kWhat, place), 0, place);
}

void allow_next_launch() {
  if (std::exchange(m.allowed_next, true)) return;
  m.waited_before_next |= own_thread().earlier_ended;
}

void wait_for_earlier_launches() { own_thread().earlier_ended = m.waited = true; }

// Called before a launch's blocks start: which launches may be unfinished then.
static void begin_launch(bool dependent) {
  const uint32_t before_early = m.early_from;
  ++m.number;
  if (dependent) {
    m.early_from = m.waited_before_next ? m.number - 1 : std::min(before_early, m.number - 1);
    m.late_from = m.waited ? m.number - 1 : std::min(before_early, m.number - 1);
  } else {
    m.early_from = m.late_from = m.number;
  }
  m.dependent = dependent;
  m.waited = m.waited_before_next = !dependent;  // all before it has ended
  m.follows_unknown = dependent && m.arrays_named && !std::exchange(m.arrays_launched, true);
  if (m.arrays_named) m.arrays_launched = true;
}

uint64_t matrix_descriptor(const void* p, int leading_bytes, int stride_bytes, Place place) {
  const uint32_t address = shared_address(p);
  for (const int bytes : {static_cast<int>(address), leading_bytes, stride_bytes})
    if (bytes < 0 || bytes % kCopy || bytes >= static_cast<int>(kDescribed))
      violate("memcheck", "describes a matrix by address or offset ", bytes, ", in ", where(place));
  return address >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t(1) << 62;
}

void warpgroup_fence(Place place) {
  check_warpgroup("warpgroup_fence", place);
  meet_warp("warpgroup_fence", 0, place, {}, [](Warp& w) { w.fenced = true; });
}

void multiply_add_64xNx16(float* d, int blocks, uint64_t a, uint64_t b, Half type, bool transposed, bool a_transposed,
                          Place place) {
  constexpr const char* kWhat = "multiply_add_64xNx16";
  check_warpgroup(kWhat, place);
  Lane lane{};
  lane.sum = d;
  lane.descriptor_a = a;
  lane.descriptor_b = b;
  const int argument = blocks << 3 | a_transposed << 2 | transposed << 1 | (type == Half::f16);
  meet_warp(kWhat, argument, place, lane, [&](Warp& w) {
    const auto wrong = [&](const auto&... why) { violate("synccheck", "is at ", kWhat, " in ", where(place), why...); };
    for (const Lane& l : w.lanes)
      if (l.descriptor_a != a || l.descriptor_b != b) wrong(" with other descriptors than others of its warp");
    if (!w.fenced) wrong(" with no warpgroup_fence since its last group");
    Warpgroup& g = own_warpgroup();
    if (w.issued == g.multiplies.size()) {
      Multiply& x = g.multiplies.emplace_back();
      x.a = a, x.b = b, x.blocks = blocks, x.type = type, x.place = place;
      x.transposed = transposed, x.a_transposed = a_transposed;
      m.granules_used = true;
      check_operand(x, a, 16 * kWarpgroup, a_transposed);
      check_operand(x, b, 8 * blocks, transposed);
      ++m.counts.warpgroup_multiply_add;
    }
    Multiply& x = g.multiplies[w.issued++];
    if (x.a != a || x.b != b || x.blocks != blocks || x.transposed != transposed || x.a_transposed != a_transposed ||
        x.type != type || x.place.line != place.line)
      wrong(", with other operands or elsewhere than others of its warpgroup, in ", where(x.place));
    const int warp = m.running / kWarp;
    for (const uint32_t i : x.copies)
      for (int l = 0; l < kWarp; ++l)
        if (!has_seen(m, warp * kWarp + l, m.tiles[i]))
          violate("racecheck", "multiplies what the copy started in ", where(m.tiles[i].place), " brings, for which ",
                  name(warp * kWarp + l), " has not waited, in ", where(place));
    Accumulators& to = take_registers(w, blocks, place);
    to.last = w.issued;
    x.to[warp % kWarpgroup] = &to;
  });
}

void warpgroup_commit(Place place) {
  check_warpgroup("warpgroup_commit", place);
  meet_warp("warpgroup_commit", 0, place, {}, [&](Warp& w) {
    Warpgroup& g = own_warpgroup();
    if (w.committed == g.ends.size()) g.ends.push_back(w.issued);
    if (g.ends[w.committed++] != w.issued)
      violate("synccheck", "commits a group of other multiplications than others of its warpgroup, in ", where(place));
    w.fenced = false;
    const int group = m.running / kWarp / kWarpgroup, first = group * kWarpgroup;
    if (committed(group) < w.committed) return;
    for (int i = 0; i < kWarpgroup * kWarp; ++i) {
      Thread& t = m.threads[first * kWarp + i];
      if (t.state == Thread::waiting && t.what == kWarpgroupWait) t.state = Thread::ready;
    }
    if (m.async == Async::lazy) return;
    run_groups(g, w.committed);
    for (int i = 0; i < kWarpgroup; ++i) give_registers(m.warps[first + i], g.done, place);
  });
}

void warpgroup_wait(int pending, Place place) {
  check_warpgroup(kWarpgroupWait, place);
  meet_warp("the warp's part of warpgroup_wait", pending, place, {}, [](Warp&) {});
  Warp& w = own_warp();
  Warpgroup& g = own_warpgroup();
  if (w.committed <= static_cast<uint32_t>(pending)) return;
  const uint32_t groups = w.committed - pending;
  while (committed(m.running / kWarp / kWarpgroup) < groups) wait(kWarpgroupWait, place);
  run_groups(g, groups);
  w.waited = std::max(w.waited, g.ends[groups - 1]);
  give_registers(w, w.waited, place);
}

void* shared(const void* site, size_t bytes, size_t element, size_t align) {
  for (const Region& r : m.shared)
    if (r.site == site) return reinterpret_cast<void*>(r.begin);
  m.shared_bytes += (bytes + align - 1) / align * align;
  if (m.shared_bytes - (m.dynamic.end - m.dynamic.begin) > kSharedLimit)
    violate("memcheck", "declares more than 48 KiB of static shared memory");
  if (m.shared_bytes > m.shared_limit)
    violate("memcheck", "has more shared memory, static and dynamic, than ", m.shared_limit >> 10, " KiB");
  Region r;
  r.name = "shared array " + std::to_string(m.shared.size());
  m.arena_used += kGuard;
  r.begin = reinterpret_cast<uintptr_t>(m.arena) + m.arena_used;
  r.end = r.begin + bytes;
  r.element = element;
  r.access = Access::out;
  r.shared = true;
  r.cells.resize(bytes / element);
  r.site = site;
  m.arena_used += (bytes + kGuard - 1) / kGuard * kGuard;
  void* data = reinterpret_cast<void*>(r.begin);
  memset(data, 0xFF, bytes);  // NaN in every floating type
  m.shared.push_back(std::move(r));
  return data;
}

void* dynamic_shared(size_t align) {
  if (align > kDynamicAlign) violate("memcheck", "declares dynamic shared memory aligned to ", align, " bytes");
  if (m.dynamic.end == m.dynamic.begin) violate("memcheck", "declares dynamic shared memory, launched without any");
  m.dynamic_align = std::max(m.dynamic_align, align);
  return reinterpret_cast<void*>(m.dynamic.begin);
}

cudaError_t find_symbol() {
  if (m.device != 0) return remembered(cudaErrorNoDevice);
  return remembered(m.capture_mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported);
}

void record_launches(int multiprocessors) {
  m.recording.on = true;
  m.recording.multiprocessors = multiprocessors;
}

void record_product(int64_t rows, int64_t columns, int64_t depth) {
  m.recording.text << "product " << rows << ' ' << columns << ' ' << depth << '\n';
}

static uintptr_t in_library(const void* code) {
  Dl_info info;
  return dladdr(code, &info) ? reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
}

using Work = std::array<uint64_t, 4>;  // instructions that tell blocks of different work apart

static Work work() {
  const Counts& c = m.counts;
  return {c.multiply_add, c.warpgroup_multiply_add, c.copies, c.tile_copies};
}

// The block that has run, of which this is the work.
static void write_block(uint64_t index, const Work& work) {
  std::ostringstream& text = m.recording.text;
  text << "block " << index;
  for (const uint64_t n : work) text << ' ' << n;
  text << '\n';
  for (const auto& [at, a] : m.recorded.accesses)
    text << "access " << static_cast<int>(at.first) << ' ' << in_library(reinterpret_cast<const void*>(at.second))
         << ' ' << *std::max_element(a.by_thread.begin(), a.by_thread.end()) << ' ' << a.times << ' ' << a.bytes << ' '
         << a.lowest << ' ' << a.end << '\n';
  for (const auto& [array, bytes] : m.recorded.tiles)
    text << "tile " << std::get<0>(array) << ' ' << std::get<1>(array) << ' ' << std::get<2>(array) << ' '
         << std::get<3>(array) << ' ' << bytes << '\n';
  m.recorded = {};
}

// Runs blocks of the launch, or its clusters, the first and last, and between two that differ in their work another
// one, until neighbours are found. Each runs alone, also past the grid's barrier.
static void record_blocks(const cudaLaunchConfig_t& config, const void* kernel, uint64_t blocks, bool dependent) {
  const dim3 g = m.grid, b = m.block;
  m.recording.text << "launch " << in_library(kernel) << ' ' << g.x << ' ' << g.y << ' ' << g.z << ' ' << b.x << ' '
                   << b.y << ' ' << b.z << ' ' << config.dynamicSmemBytes << ' ' << m.cooperative << ' ' << m.cluster
                   << ' ' << dependent << '\n';
  const bool together = m.cooperative || m.cluster > 1;
  if (!together) prepare_block(config.dynamicSmemBytes);
  std::map<uint64_t, Work> ran;
  const auto run = [&](uint64_t i) {
    if (const auto known = ran.find(i); known != ran.end()) return known->second;
    const Work before = work();
    if (m.cooperative) {
      run_together({i}, config.dynamicSmemBytes);
    } else if (m.cluster > 1) {
      run_cluster(i * m.cluster, config.dynamicSmemBytes);
    } else {
      start_block(i);
      m.visit = ++m.visits;
      m.cluster_arrivals = 0;
      m.cluster_phase = 0;
      m.cluster_gathered = m.cluster_told = {};
      run_block();
    }
    Work did = work();
    for (size_t k = 0; k < did.size(); ++k) did[k] = (did[k] - before[k]) / m.cluster;
    for (int r = 0; r < m.cluster; ++r) {
      if (together) change_over(r);
      write_block(i * m.cluster + r, did);
      if (together) change_over(r);
    }
    return ran[i] = did;
  };
  const std::function<void(uint64_t, uint64_t)> between = [&](uint64_t first, uint64_t last) {
    if (last - first < 2 || run(first) == run(last)) return;
    const uint64_t middle = first + (last - first) / 2;
    run(middle);
    between(first, middle);
    between(middle, last);
  };
  const uint64_t n = blocks / m.cluster;
  for (const uint64_t i : {uint64_t(0), uint64_t(1), n / 3, n * 2 / 3, n - 1})
    if (i < n) run(i);
  const std::map<uint64_t, Work> first_ones = ran;
  for (auto at = first_ones.begin(); std::next(at) != first_ones.end(); ++at) between(at->first, std::next(at)->first);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* started,
                   size_t started_bytes) {
  const dim3 g = config.gridDim, b = config.blockDim;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z, blocks = uint64_t(g.x) * g.y * g.z;
  if (blocks == 0 || g.x > INT32_MAX || g.y > 65535 || g.z > 65535 || threads == 0 || threads > kMaxThreads || b.z > 64)
    return cudaErrorInvalidConfiguration;
  const auto asked = m.dynamic_limits.find(kernel);
  const bool has_asked = asked != m.dynamic_limits.end();
  if (config.dynamicSmemBytes > (has_asked ? asked->second : kSharedLimit)) return cudaErrorInvalidValue;
  bool cooperative = false, dependent = false;
  dim3 cluster(1, 1, 1);
  int ways = 0;  // the attributes, as bits of their ids
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& [id, pad, value] = config.attrs[i];
    ways |= 1 << id;
    if (id == cudaLaunchAttributeCooperative)
      cooperative = value.cooperative;
    else if (id == cudaLaunchAttributeProgrammaticStreamSerialization)
      dependent = value.programmaticStreamSerializationAllowed;
    else if (id == cudaLaunchAttributeClusterDimension)
      cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
    else
      return cudaErrorNotSupported;  // here, not by CUDA
  }
  if (m.refused_together ? (ways & m.refused) == m.refused : ways & m.refused) return cudaErrorNotSupported;
  if (cooperative && blocks > kResident && !m.recording.on) return cudaErrorCooperativeLaunchTooLarge;
  if (cluster.x < 1 || cluster.x > kCluster || g.x % cluster.x || cluster.y != 1 || cluster.z != 1)
    return cudaErrorInvalidClusterSize;
  if (cooperative && cluster.x > 1) return cudaErrorNotSupported;  // here, not by CUDA
  if (m.device != 0 && (cluster.x > 1 || dependent)) return cudaErrorNotSupported;
  ++m.counts.launches;
  m.body = body;
  m.started = started;
  m.grid = g;
  m.block = b;
  m.cooperative = cooperative;
  m.cluster = static_cast<int>(cluster.x);
  m.cluster_arrivals = 0;
  m.cluster_phase = 0;
  begin_launch(dependent);
  m.shared_limit = has_asked ? kLargeSharedLimit : kSharedLimit;
  struct Parameters {  // threads read them where the launch keeps them
    Parameters(const void* p, size_t bytes) {
      Region r;
      r.name = "the kernel's parameters";
      r.begin = reinterpret_cast<uintptr_t>(p);
      r.end = r.begin + bytes;
      r.access = Access::in;
      r.parameters = true;
      m.arrays.push_back(std::move(r));
    }
    ~Parameters() { m.arrays.pop_back(); }
  } parameters(started, started_bytes);

  m.first_visit = m.visits + 1;
  if (m.recording.on) {
    record_blocks(config, kernel, blocks, dependent);
    m.cluster = 1;
    return cudaSuccess;
  }
  std::vector<uint64_t> order(cooperative || m.schedule == Schedule::random ? blocks : 0);
  std::iota(order.begin(), order.end(), uint64_t(0));
  if (backwards()) std::reverse(order.begin(), order.end());
  if (cooperative) {
    run_together(order, config.dynamicSmemBytes);
    return cudaSuccess;
  }
  if (m.cluster > 1) {
    order.resize(blocks / m.cluster);
    std::iota(order.begin(), order.end(), uint64_t(0));
    if (backwards()) std::reverse(order.begin(), order.end());
  }
  if (m.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), m.random);
  if (m.cluster > 1) {
    for (const uint64_t k : order) run_cluster(k * m.cluster, config.dynamicSmemBytes);
    m.cluster = 1;
    return cudaSuccess;
  }
  prepare_block(config.dynamicSmemBytes);
  for (uint64_t k = 0; k < blocks; ++k) {
    start_block(!order.empty() ? order[k] : backwards() ? blocks - 1 - k : k);
    m.visit = ++m.visits;
    m.cluster_arrivals = 0;
    m.cluster_phase = 0;
    m.cluster_gathered = m.cluster_told = {};
    run_block();
  }
  return cudaSuccess;
}

}  // namespace emulator

// The functions of include/cuda_runtime.h: threads never run at the same time, so plain operations are atomic.
#define EMULATOR_ATOMIC(name, T, operation)                                             \
  T name(T* p, T v) {                                                                   \
    emulator::check(p, sizeof *p, emulator::Kind::atomic, __builtin_return_address(0)); \
    const T old = *p;                                                                   \
    *p operation v;                                                                     \
    return old;                                                                         \
  }
EMULATOR_ATOMIC(atomicAdd, int, +=)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, +=)
EMULATOR_ATOMIC(atomicExch, unsigned long long, =)
#undef EMULATOR_ATOMIC

// Which of the mutants that kernels may hold runs (switched.py), if any.
static const int mutant = [] {
  const char* const number = getenv("EMULATED_MUTANT");
  return number ? atoi(number) : 0;
}();
extern "C" int emulated_mutant() { return mutant; }

// For those who load a library that is no Python module.
extern "C" __attribute__((visibility("default"))) int64_t emulated_launches() { return emulator::counts().launches; }
extern "C" __attribute__((visibility("default"))) int64_t emulated_questions() { return emulator::counts().questions; }
extern "C" __attribute__((visibility("default"))) int64_t emulated_maps() { return emulator::counts().maps; }
extern "C" __attribute__((visibility("default"))) void emulated_device(int device) { emulator::set_device(device); }
extern "C" __attribute__((visibility("default"))) void emulated_refusal(int attributes, bool together) {
  emulator::refuse(attributes, together);
}

extern "C" __attribute__((visibility("default"))) void emulator_record(int multiprocessors) {
  emulator::record_launches(multiprocessors);
}
// The record so far, which begins again.
extern "C" __attribute__((visibility("default"))) const char* emulator_recorded() {
  static std::string text;
  text = emulator::m.recording.text.str();
  emulator::m.recording.text.str("");
  return text.c_str();
}

// What -fsanitize=thread calls; the names are the compiler's.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define EMULATOR_ACCESS(n)                                                                                            \
  void __tsan_read##n(void* p) { emulator::check_access(p, n, emulator::Kind::load, __builtin_return_address(0)); }   \
  void __tsan_write##n(void* p) { emulator::check_access(p, n, emulator::Kind::store, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##n(void* p) {                                                                            \
    emulator::check_access(p, n, emulator::Kind::load, __builtin_return_address(0));                                  \
  }                                                                                                                   \
  void __tsan_unaligned_write##n(void* p) {                                                                           \
    emulator::check_access(p, n, emulator::Kind::store, __builtin_return_address(0));                                 \
  }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
#undef EMULATOR_ACCESS
void __tsan_read_range(void* p, size_t n) {
  emulator::check_access(p, n, emulator::Kind::load, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  emulator::check_access(p, n, emulator::Kind::store, __builtin_return_address(0));
}

// Of the launchers' std::atomic.
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_or(volatile int* p, int v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }

#ifndef __SANITIZE_ADDRESS__  // which brings its own
// What -fsanitize=alignment calls for an address that its type does not allow.
void __ubsan_handle_type_mismatch_v1(const emulator::Place* place, uintptr_t address) {
  if (emulator::m.running >= 0)
    emulator::violate("memcheck", "uses address ", address, ", which is not aligned to the type there, in ",
                      emulator::where(*place));
}
#endif

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++emulator::m.counts.questions;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return emulator::remembered(cudaErrorNotSupported);  // here, not by CUDA
  if (value < 0 || size_t(value) > emulator::kLargeSharedLimit) return emulator::remembered(cudaErrorInvalidValue);
  emulator::m.dynamic_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emulator::m.capture_mode);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::m.last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  if (emulator::m.device < 0 || emulator::m.device > 1) return emulator::remembered(cudaErrorNoDevice);
  *device = emulator::m.device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++emulator::m.counts.questions;
  if (device < 0 || device > 1) return emulator::remembered(cudaErrorInvalidDevice);
  const int capability = device == 0 ? 90 : 86;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      // with a block on each
      *value = emulator::m.recording.on ? emulator::m.recording.multiprocessors : emulator::kResident;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    default:
      return emulator::remembered(cudaErrorInvalidValue);
  }
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t shared_bytes) {
  ++emulator::m.counts.questions;
  const auto asked = emulator::m.dynamic_limits.find(kernel);
  const size_t limit = asked == emulator::m.dynamic_limits.end() ? emulator::kSharedLimit : asked->second;
  *blocks = threads <= emulator::kMaxThreads && shared_bytes <= limit;
  // Recorded kernels are compiled to stand twice on a multiprocessor at most, where its shared memory lets them.
  if (emulator::m.recording.on && 2 * (shared_bytes + 1024) <= emulator::kMultiprocessorShared) *blocks *= 2;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled"), old = version < 12000;
  *function = known && !old ? reinterpret_cast<void*>(&emulator::encode_tiled) : nullptr;
  if (status)
    *status = !known ? cudaDriverEntryPointSymbolNotFound
              : old  ? cudaDriverEntryPointVersionNotSufficent
                     : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "the emulator has no such attribute";
    default:
      return "no error";
  }
}
}

// The runtime behind emulator.h, and the CUDA runtime's functions that the launchers call.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
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

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;
constexpr size_t kSharedLimit = 48 << 10;        // of shared memory for a kernel that asked for no more, as on every GPU
constexpr size_t kLargeSharedLimit = 227 << 10;  // for one that did, on the largest GPUs
constexpr size_t kGuard = 256;                   // bytes between shared arrays, owned by nobody
constexpr size_t kDistance = 1 << 20;            // at least, between the call's arrays
constexpr size_t kDynamicAlign = 1024;
constexpr size_t kDynamicOffset = 2 * kSharedLimit + kDynamicAlign;  // in the arena; static arrays lie before it
constexpr size_t kSharedArena = kDynamicOffset + kLargeSharedLimit + 4096;
constexpr size_t kDynamicElement = 2;
constexpr size_t kCopy = 16;  // bytes that one asynchronous copy writes

enum class Kind { load, store, atomic };

// Who touched one element last. Blocks are numbered through all launches from 1, so that 0 is nobody.
struct Touch {
  uint32_t block = 0, epoch = 0, warp_epoch = 0;
  uint16_t thread = 0;     // or kMany, or kWarpOf + warp: several threads of that warp
  bool in_flight = false;  // a store by a copy that has not landed
  bool atomic = false;
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
  std::vector<Cell> cells;     // none: readable, unwatched
  const void* site = nullptr;  // of a static shared array
};

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  Place place;
  uint32_t group;
};

struct Thread {
  enum State { ready, waiting, returned };
  void* stack_pointer = nullptr;
  uintptr_t stack = 0;
  State state = ready;
  uint3 index{};
  std::vector<Copy> copies;  // under way, oldest first
  uint32_t groups = 0;       // closed
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
};

struct Warp {
  Meeting meeting;
  Lane lanes[kWarp];
  int size = 0, returned = 0, at_barrier = 0;  // threads
  uint32_t epoch = 0;                          // __syncwarps passed
};

struct Machine {
  Schedule schedule = Schedule::forward;
  Async async = Async::lazy;
  std::mt19937 random{1};
  Counts counts;
  std::vector<Region> arrays;  // of the call
  bool arrays_named = false;
  std::map<const void*, size_t> dynamic_limits;  // of kernels that asked for more

  // of the launch
  void (*body)(void*) = nullptr;
  void* started = nullptr;
  dim3 grid, block;
  uint32_t first_block = 1;
  size_t shared_limit = kSharedLimit;

  // of the block that runs
  uint32_t block_number = 0;
  uint3 block_index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Region> shared;
  Region dynamic;           // its cells stay from block to block
  size_t shared_bytes = 0;  // as the GPU counts them
  size_t arena_used = 0;
  Meeting barrier;
  uint32_t epoch = 0;  // barriers passed
  int returned = 0;
  int running = -1;     // thread, or -1 outside kernels
  uintptr_t stack = 0;  // its
  void* scheduler = nullptr;
  std::string violation;

  char* stacks = nullptr;
  char* arena = nullptr;
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

void leave() { emulator_switch(&m.threads[m.running].stack_pointer, m.scheduler); }

// Ends the launch: the scheduler throws the text. Never returns.
template <typename... Parts>
[[noreturn]] void violate(const char* kind, const Parts&... parts) {
  std::ostringstream s;
  s << kind << ": " << name(m.running) << " of block (" << m.block_index.x << ", " << m.block_index.y << ", " << m.block_index.z
    << ") ";
  (s << ... << parts);
  m.violation = s.str();
  for (;;) leave();
}

std::ostream& operator<<(std::ostream& s, const Meeting& meeting) { return s << meeting.what << " in " << where(meeting.place); }

Warp& own_warp() { return m.warps[m.running / kWarp]; }

void thread_main() {
  m.body(m.started);
  Thread& t = m.threads[m.running];
  t.state = Thread::returned;
  ++m.returned;
  ++own_warp().returned;
  if (m.barrier.arrived) violate("synccheck", "returned while others wait at ", m.barrier);
  if (own_warp().meeting.arrived) violate("synccheck", "returned while others of its warp wait at ", own_warp().meeting);
  if (!t.copies.empty()) violate("synccheck", "returned before the copy it started in ", where(t.copies[0].place), " had landed");
  for (;;) leave();
}

// The calling lane meets the others of its warp; the last one does `act(warp)` for all.
template <typename Act>
void meet_warp(const char* what, int argument, Place place, const Lane& lane, const Act& act) {
  Warp& w = own_warp();
  Meeting& meeting = w.meeting;
  const auto lacks = [&](const auto&... why) { violate("synccheck", "is at ", what, " in ", where(place), ", ", why...); };
  if (w.size < kWarp) lacks("but its warp has ", w.size, " threads");
  if (w.returned) lacks("but ", w.returned, " threads of its warp have returned");
  if (w.at_barrier) lacks("others of its warp are at ", m.barrier);
  if (meeting.arrived && !meeting.is_at(what, argument, place)) lacks("others of its warp are at ", meeting);
  meeting.what = what;
  meeting.argument = argument;
  meeting.place = place;
  w.lanes[m.running % kWarp] = lane;
  if (++meeting.arrived < kWarp) {
    m.threads[m.running].state = Thread::waiting;
    leave();
    return;
  }
  meeting.arrived = 0;
  act(w);
  const int first = m.running / kWarp * kWarp;
  for (int l = 0; l < kWarp; ++l) m.threads[first + l].state = Thread::ready;
}

bool greedy() { return m.schedule == Schedule::greedy || m.schedule == Schedule::greedy_reverse; }
bool backwards() { return m.schedule == Schedule::reverse || m.schedule == Schedule::greedy_reverse; }

void start_block() {
  for (Thread& t : m.threads) {
    t.state = Thread::ready;
    t.copies.clear();
    t.groups = 0;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(reinterpret_cast<void*>(t.stack), kStack);  // of frames that were left without returning
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
  m.arena_used = 0;
  memset(reinterpret_cast<void*>(m.dynamic.begin), 0xFF, m.shared_bytes);  // NaN in every floating type
  m.barrier = {};
  m.epoch = 0;
  m.returned = 0;
}

void run_block() {
  start_block();
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
  while (m.returned < n) {
    if (m.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), m.random);
    const int group = greedy() ? kWarp : n;
    bool ran = false;
    for (int first = 0; first < n; first += group)
      while (turn(first, std::min(n, first + group))) {
        ran = true;
        if (!greedy()) break;
      }
    if (!ran) throw std::runtime_error("synccheck: all threads of a block wait");
  }
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
  if (t.block != now.block) return !shared && t.block >= m.first_block;  // else an earlier launch's
  if (t.thread == now.thread || t.epoch != now.epoch) return false;
  const int warp = t.thread == kMany ? -1 : t.thread & kWarpOf ? t.thread & ~kWarpOf : t.thread / kWarp;
  return warp != now.thread / kWarp || t.warp_epoch == now.warp_epoch;
}

// `load` after one more.
void add_load(Touch& load, const Touch& now, bool shared) {
  if (load.block != now.block) {
    // of two blocks the earlier one is kept: it races with whatever either may race with
    if (shared || load.block < m.first_block) load = now;
  } else if (load.epoch != now.epoch || load.thread == now.thread) {
    load = now;
  } else {
    const uint16_t warp = kWarpOf + now.thread / kWarp;
    const bool same = load.thread == warp || load.thread / kWarp == now.thread / kWarp;
    const bool ordered = same && load.warp_epoch != now.warp_epoch;
    load = now;
    if (!ordered) load.thread = same ? warp : kMany;
  }
}

std::string who(const Touch& t) {
  if (t.block != m.block_number) return "another block";
  return t.thread & kWarpOf ? "others" : name(t.thread);
}

Place copy_into(uintptr_t address, const Touch& store) {
  for (const Copy& c : m.threads[store.thread].copies)
    if (address - reinterpret_cast<uintptr_t>(c.to) < kCopy) return c.place;
  return {"?", 0};
}

Touch touch_now() { return {m.block_number, m.epoch, own_warp().epoch, static_cast<uint16_t>(m.running), false, false}; }

// One load or store of `bytes` bytes at `address`, made at `place`: a Place or the code behind the access. Gives the region, if
// any is watched there.
template <typename At>
Region* check(const void* pointer, size_t bytes, Kind kind, At place) {
  const bool store = kind != Kind::load;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Region* r = find(address, bytes);
  if (!r) {
    if (!m.arrays_named && !in_arena(address)) return nullptr;
    std::ostringstream near;
    const auto measure = [&](const Region& a) {
      if (address + 4096 > a.begin && address < a.end + 4096)
        near << ", at byte " << static_cast<ptrdiff_t>(address - a.begin) << " of the " << a.end - a.begin << " of " << a.name;
    };
    for (const Region& a : in_arena(address) ? m.shared : m.arrays) measure(a);
    if (in_arena(address) && m.dynamic.end > m.dynamic.begin) measure(m.dynamic);
    violate("memcheck", store ? "stores " : "loads ", bytes, " bytes outside every array", near.str(), ", in ", where(place));
  }
  if (store && r->access == Access::in) violate("memcheck", "stores to the input ", r->name, ", in ", where(place));
  if (r->cells.empty()) return r;

  Touch now = touch_now();
  now.atomic = kind == Kind::atomic;
  const char* does = store ? "stores to" : "loads";
  const size_t first = (address - r->begin) / r->element, last = (address + bytes - 1 - r->begin) / r->element;
  for (size_t i = first; i <= last; ++i) {
    Cell& c = r->cells[i];
    if (c.store.in_flight && c.store.block == now.block)
      violate("racecheck", does, " element ", i, " of ", r->name, ", into which a copy started by ", name(c.store.thread), " in ",
              where(copy_into(r->begin + i * r->element, c.store)), " is under way, in ", where(place));
    const bool two_atomics = now.atomic && c.store.atomic;
    const bool after_store = races(c.store, now, r->shared) && !two_atomics;
    if (after_store || (store && races(c.load, now, r->shared)))
      violate("racecheck", does, " element ", i, " of ", r->name, ", which ", who(after_store ? c.store : c.load),
              after_store ? " stored to" : " loaded", " with no barrier between, in ", where(place));
    const bool unwritten = r->shared ? c.store.block != now.block : c.store.block == 0;
    if (kind != Kind::store && unwritten && r->access == Access::out)
      violate("initcheck", "loads element ", i, " of ", r->name, ", which nobody has stored to, in ", where(place));
    if (!store)
      add_load(c.load, now, r->shared);
    else if (!two_atomics || !races(c.store, now, r->shared))
      c.store = now;
    else if (c.store.block == now.block)  // else the earlier block's is kept: it races with whatever either may race with
      c.store.thread = kMany;
  }
  return r;
}

// From the compiler's call before an access. Most are to the thread's own stack.
inline void check_access(void* p, size_t bytes, Kind kind, const void* code) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - m.stack;
  if (offset < kStack && bytes <= kStack - offset) return;
  if (m.running >= 0) check(p, bytes, kind, code);
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

char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for the threads' stacks");
  return static_cast<char*>(p);
}

}  // namespace

void set_schedule(Schedule schedule, unsigned seed) {
  m.schedule = schedule;
  m.random.seed(seed);
}

void set_async(Async async) { m.async = async; }

const Counts& counts() { return m.counts; }
void clear_counts() { m.counts = {}; }

Arrays::~Arrays() {
  for (const Copy& c : copies_) {
    if (c.to) memcpy(c.to, c.data, c.bytes);
    free(c.block);
  }
  m.arrays.clear();
  m.arrays_named = false;
}

void* Arrays::add(const char* name, const void* data, size_t bytes, size_t element, Access access) {
  char* block = static_cast<char*>(aligned_alloc(kDistance, (bytes + 4 * kDistance - 1) / kDistance * kDistance));
  if (!block) throw std::bad_alloc();
  void* copy = block + kDistance + reinterpret_cast<uintptr_t>(data) % kCopy;  // no better aligned than the caller's
  memcpy(copy, data, bytes);
  copies_.push_back({block, copy, access == Access::in ? nullptr : const_cast<void*>(data), bytes});
  Region r;
  r.name = name;
  r.begin = reinterpret_cast<uintptr_t>(copy);
  r.end = r.begin + bytes;
  r.element = element;
  r.access = access;
  if (access != Access::in) r.cells.resize(bytes / element);  // nothing can be wrong with a load of an input
  m.arrays.push_back(std::move(r));
  m.arrays_named = true;
  return copy;
}

uint3 thread_index() { return m.threads[m.running].index; }
uint3 block_index() { return m.block_index; }
dim3 block_dim() { return m.block; }
dim3 grid_dim() { return m.grid; }

void barrier(Place place) {
  Meeting& b = m.barrier;
  constexpr const char* kWhat = "the barrier";
  const auto lacks = [&](const auto&... why) { violate("synccheck", "is at the barrier in ", where(place), ", ", why...); };
  if (m.returned) lacks("but ", m.returned, " threads of the block have returned");
  if (own_warp().meeting.arrived) lacks("others of its warp are at ", own_warp().meeting);
  if (b.arrived && !b.is_at(kWhat, 0, place)) lacks("others are at ", b);
  b.what = kWhat;
  b.place = place;
  ++own_warp().at_barrier;
  if (++b.arrived < static_cast<int>(m.threads.size())) {
    m.threads[m.running].state = Thread::waiting;
    leave();
    return;
  }
  b.arrived = 0;
  ++m.epoch;
  for (Thread& t : m.threads) t.state = Thread::ready;
  for (Warp& w : m.warps) w.at_barrier = 0;
}

uint32_t shared_address(const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (!in_arena(address)) violate("memcheck", "takes an address that is not in shared memory for one that is");
  return static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(m.arena));
}

void sync_warp(Place place) {
  meet_warp("__syncwarp", 0, place, {}, [](Warp& w) { ++w.epoch; });
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
        const uint32_t low = transposed ? matrix[t][g] : matrix[g][t], high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
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
  return reinterpret_cast<void*>(m.dynamic.begin);
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
  if (config.numAttrs != 0) return cudaErrorNotSupported;  // here, not by CUDA
  if (!m.stacks) {
    m.stacks = reserve(kStack * kMaxThreads);
    m.arena = reserve(kSharedArena);
    m.dynamic.name = "dynamic shared memory";
    m.dynamic.element = kDynamicElement;
    m.dynamic.access = Access::out;
    m.dynamic.shared = true;
  }
  m.body = body;
  m.started = started;
  m.grid = g;
  m.block = b;
  m.threads.resize(threads);
  m.warps.resize((threads + kWarp - 1) / kWarp);
  m.shared_limit = has_asked ? kLargeSharedLimit : kSharedLimit;
  m.dynamic.begin = reinterpret_cast<uintptr_t>(m.arena) + kDynamicOffset;
  m.dynamic.end = m.dynamic.begin + config.dynamicSmemBytes;
  m.dynamic.cells.resize((config.dynamicSmemBytes + kDynamicElement - 1) / kDynamicElement);
  for (uint32_t i = 0; i < threads; ++i) {
    m.threads[i].stack = reinterpret_cast<uintptr_t>(m.stacks) + kStack * i;
    m.threads[i].index = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
  }
  struct Parameters {  // threads read them where the launch keeps them
    Parameters(const void* p, size_t bytes) {
      Region r;
      r.name = "the kernel's parameters";
      r.begin = reinterpret_cast<uintptr_t>(p);
      r.end = r.begin + bytes;
      r.access = Access::in;
      m.arrays.push_back(std::move(r));
    }
    ~Parameters() { m.arrays.pop_back(); }
  } parameters(started, started_bytes);

  std::vector<uint64_t> order(m.schedule == Schedule::random ? blocks : 0);
  std::iota(order.begin(), order.end(), uint64_t(0));
  std::shuffle(order.begin(), order.end(), m.random);
  m.first_block = m.block_number + 1;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t i = !order.empty() ? order[k] : backwards() ? blocks - 1 - k : k;
    m.block_index = {uint32_t(i % g.x), uint32_t(i / g.x % g.y), uint32_t(i / (uint64_t(g.x) * g.y))};
    ++m.block_number;
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

// What -fsanitize=thread calls; the names are the compiler's.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define EMULATOR_ACCESS(n)                                                                                                    \
  void __tsan_read##n(void* p) { emulator::check_access(p, n, emulator::Kind::load, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { emulator::check_access(p, n, emulator::Kind::store, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##n(void* p) { emulator::check_access(p, n, emulator::Kind::load, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { emulator::check_access(p, n, emulator::Kind::store, __builtin_return_address(0)); }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
#undef EMULATOR_ACCESS
void __tsan_read_range(void* p, size_t n) { emulator::check_access(p, n, emulator::Kind::load, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { emulator::check_access(p, n, emulator::Kind::store, __builtin_return_address(0)); }

#ifndef __SANITIZE_ADDRESS__  // which brings its own
// What -fsanitize=alignment calls for an address that its type does not allow.
void __ubsan_handle_type_mismatch_v1(const emulator::Place* place, uintptr_t address) {
  if (emulator::m.running >= 0)
    emulator::violate("memcheck", "uses address ", address, ", which is not aligned to the type there, in ",
                      emulator::where(*place));
}
#endif

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;  // here, not by CUDA
  if (value < 0 || size_t(value) > emulator::kLargeSharedLimit) return cudaErrorInvalidValue;
  emulator::m.dynamic_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches return theirs
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrComputeCapabilityMajor && attribute != cudaDevAttrComputeCapabilityMinor)
    return cudaErrorInvalidValue;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 0;  // what the emulated instructions need
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNotSupported:
      return "the emulator has no such attribute";
    default:
      return "no error";
  }
}
}

// The runtime behind emulator.h, and the CUDA runtime's functions that the launchers call.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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
constexpr size_t kSharedLimit = 48 << 10;  // of static shared memory, as on every GPU
constexpr size_t kSharedArena = 2 * kSharedLimit;
constexpr size_t kGuard = 256;          // bytes between shared arrays, owned by nobody
constexpr uint32_t kMany = UINT32_MAX;  // more than one thread, or block

// Who touched one element last. Blocks are numbered through all launches from 1, so that 0 is nobody.
struct Touch {
  uint32_t block = 0, thread = 0, epoch = 0;
};
struct Cell {
  Touch store, load;
};

// A range of memory that kernels may touch, in elements.
struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  size_t element = 1;
  Access access = Access::inout;
  std::vector<Cell> cells;     // none: readable, unwatched
  const void* site = nullptr;  // of a shared array
};

struct Thread {
  enum State { ready, waiting, returned };
  void* stack_pointer = nullptr;
  uintptr_t stack = 0;
  State state = ready;
  uint3 index{};
};

// Threads that wait for one another at one place in the source.
struct Meeting {
  int arrived = 0;
  const char* file = nullptr;
  int line = 0;
};

struct Machine {
  Schedule schedule = Schedule::forward;
  std::mt19937 random{1};
  std::vector<Region> arrays;  // of the call
  bool arrays_named = false;

  // of the launch
  void (*body)(void*) = nullptr;
  void* started = nullptr;
  dim3 grid, block;
  uint32_t first_block = 1;

  // of the block that runs
  uint32_t block_number = 1;
  uint3 block_index{};
  std::vector<Thread> threads;
  std::vector<Region> shared;
  size_t shared_bytes = 0;  // as the GPU counts them
  size_t arena_used = 0;
  Meeting barrier;
  uint32_t epoch = 0;  // barriers passed
  int returned = 0;
  int running = -1;  // thread, or -1 outside kernels
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

void thread_main() {
  m.body(m.started);
  m.threads[m.running].state = Thread::returned;
  ++m.returned;
  if (m.barrier.arrived)
    violate("synccheck", "returned while others wait at the barrier in ", m.barrier.file, ":", m.barrier.line);
  for (;;) leave();
}

bool greedy() { return m.schedule == Schedule::greedy || m.schedule == Schedule::greedy_reverse; }
bool backwards() { return m.schedule == Schedule::reverse || m.schedule == Schedule::greedy_reverse; }

void start_block() {
  for (Thread& t : m.threads) {
    t.state = Thread::ready;
    // what emulator_switch pops: six registers, then the address to return to; aligned as after a call
    void** top = reinterpret_cast<void**>(t.stack + kStack) - 1;
    *--top = reinterpret_cast<void*>(&thread_main);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    t.stack_pointer = top;
  }
  m.shared.clear();
  m.shared_bytes = m.arena_used = 0;
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
      emulator_switch(&m.scheduler, m.threads[order[k]].stack_pointer);
      m.running = -1;
      if (!m.violation.empty()) throw std::runtime_error(std::exchange(m.violation, {}));
    }
    return ran;
  };
  while (m.returned < n) {
    if (m.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), m.random);
    const int group = greedy() ? kWarp : n;
    for (int first = 0; first < n; first += group)
      while (turn(first, std::min(n, first + group)) && greedy());
  }
}

// One load or store of `bytes` bytes at `pointer`, which a GPU wants to be a multiple of `align`, made by the code before `code`.
void check(const void* pointer, size_t bytes, size_t align, bool store, const void* code) {
  if (m.running < 0) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer), stack = m.threads[m.running].stack;
  if (address >= stack && address + bytes <= stack + kStack) return;
  if (address % align != 0)
    violate("memcheck", store ? "stores " : "loads ", bytes, " bytes at an address that they do not divide, in ", where(code));

  const auto find = [&](std::vector<Region>& list) {
    for (Region& r : list)
      if (address >= r.begin && address + bytes <= r.end) return &r;
    return static_cast<Region*>(nullptr);
  };
  Region* r = find(m.shared);
  if (!r) r = find(m.arrays);
  if (!r) {
    const uintptr_t arena = reinterpret_cast<uintptr_t>(m.arena);
    if (!m.arrays_named && (address < arena || address >= arena + kSharedArena)) return;
    std::ostringstream near;
    for (const auto* list : {&m.shared, &m.arrays})
      for (const Region& a : *list)
        if (address + 4096 > a.begin && address < a.end + 4096)
          near << ", at byte " << static_cast<ptrdiff_t>(address - a.begin) << " of the " << a.end - a.begin << " of " << a.name;
    violate("memcheck", store ? "stores " : "loads ", bytes, " bytes outside every array", near.str(), ", in ", where(code));
  }
  if (store && r->access == Access::in) violate("memcheck", "stores to the input ", r->name, ", in ", where(code));
  if (r->cells.empty()) return;

  const Touch now{m.block_number, static_cast<uint32_t>(m.running), m.epoch};
  const auto conflicts = [&](const Touch& t) {
    if (t.block < m.first_block) return false;  // an earlier launch's
    return t.block != now.block || (t.thread != now.thread && t.epoch == now.epoch);
  };
  const size_t first = (address - r->begin) / r->element, last = (address + bytes - 1 - r->begin) / r->element;
  for (size_t i = first; i <= last; ++i) {
    Cell& c = r->cells[i];
    const bool after_store = conflicts(c.store);
    if (after_store || (store && conflicts(c.load))) {
      const Touch& other = after_store ? c.store : c.load;
      violate("racecheck", store ? "stores to" : "loads", " element ", i, " of ", r->name, ", which ",
              other.block != now.block ? "another block"
              : other.thread == kMany  ? "others"
                                       : name(other.thread),
              after_store ? " stored to" : " loaded", " with no barrier between, in ", where(code));
    }
    if (store) {
      c.store = now;
    } else {
      if (c.store.block == 0 && r->access == Access::out)
        violate("initcheck", "loads element ", i, " of ", r->name, ", which nobody has stored to, in ", where(code));
      if (c.load.block >= m.first_block && c.load.block != now.block)
        c.load.block = kMany;
      else if (c.load.block == now.block && c.load.epoch == now.epoch && c.load.thread != now.thread)
        c.load.thread = kMany;
      else
        c.load = now;
    }
  }
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

Arrays::~Arrays() {
  m.arrays.clear();
  m.arrays_named = false;
}

void Arrays::add(const char* name, const void* data, size_t bytes, size_t element, Access access) {
  Region r;
  r.name = name;
  r.begin = reinterpret_cast<uintptr_t>(data);
  r.end = r.begin + bytes;
  r.element = element;
  r.access = access;
  r.cells.resize(bytes / element);
  m.arrays.push_back(std::move(r));
  m.arrays_named = true;
}

uint3 thread_index() { return m.threads[m.running].index; }
uint3 block_index() { return m.block_index; }
dim3 block_dim() { return m.block; }
dim3 grid_dim() { return m.grid; }

void barrier(const char* file, int line) {
  Meeting& b = m.barrier;
  if (m.returned)
    violate("synccheck", "waits at the barrier in ", file, ":", line, ", but ", m.returned,
            " threads of the block have returned");
  if (b.arrived && (b.line != line || strcmp(b.file, file) != 0))
    violate("synccheck", "is at the barrier in ", file, ":", line, ", others are at that in ", b.file, ":", b.line);
  b.file = file;
  b.line = line;
  if (++b.arrived < static_cast<int>(m.threads.size())) {
    m.threads[m.running].state = Thread::waiting;
    leave();
    return;
  }
  b.arrived = 0;
  ++m.epoch;
  for (Thread& t : m.threads) t.state = Thread::ready;
}

void* shared(const void* site, size_t bytes, size_t element, size_t align) {
  for (const Region& r : m.shared)
    if (r.site == site) return reinterpret_cast<void*>(r.begin);
  m.shared_bytes += (bytes + align - 1) / align * align;
  if (m.shared_bytes > kSharedLimit) violate("memcheck", "declares more than 48 KiB of static shared memory");
  Region r;
  r.name = "shared array " + std::to_string(m.shared.size());
  m.arena_used += kGuard;
  r.begin = reinterpret_cast<uintptr_t>(m.arena) + m.arena_used;
  r.end = r.begin + bytes;
  r.element = element;
  r.access = Access::out;
  r.cells.resize(bytes / element);
  r.site = site;
  m.arena_used += (bytes + kGuard - 1) / kGuard * kGuard;
  void* data = reinterpret_cast<void*>(r.begin);
  memset(data, 0xFF, bytes);  // NaN in every floating type
  m.shared.push_back(std::move(r));
  return data;
}

cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(void*), void* started, size_t started_bytes) {
  const dim3 g = config.gridDim, b = config.blockDim;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z, blocks = uint64_t(g.x) * g.y * g.z;
  if (blocks == 0 || g.x > INT32_MAX || g.y > 65535 || g.z > 65535 || threads == 0 || threads > kMaxThreads || b.z > 64)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes != 0 || config.numAttrs != 0) return cudaErrorNotSupported;  // here, not by CUDA
  if (!m.stacks) {
    m.stacks = reserve(kStack * kMaxThreads);
    m.arena = reserve(kSharedArena);
  }
  m.body = body;
  m.started = started;
  m.grid = g;
  m.block = b;
  m.threads.resize(threads);
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
  m.first_block = m.block_number;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t i = !order.empty() ? order[k] : backwards() ? blocks - 1 - k : k;
    m.block_index = {uint32_t(i % g.x), uint32_t(i / g.x % g.y), uint32_t(i / (uint64_t(g.x) * g.y))};
    run_block();
    ++m.block_number;
  }
  return cudaSuccess;
}

}  // namespace emulator

// What -fsanitize=thread calls; the names are the compiler's.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define EMULATOR_ACCESS(n)                                                                                 \
  void __tsan_read##n(void* p) { emulator::check(p, n, n, false, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { emulator::check(p, n, n, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##n(void* p) { emulator::check(p, n, n, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { emulator::check(p, n, n, true, __builtin_return_address(0)); }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
#undef EMULATOR_ACCESS
void __tsan_read_range(void* p, size_t n) { emulator::check(p, n, 1, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { emulator::check(p, n, 1, true, __builtin_return_address(0)); }

cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches return theirs
const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "the emulator has neither dynamic shared memory nor launch attributes yet";
    default:
      return "no error";
  }
}
}

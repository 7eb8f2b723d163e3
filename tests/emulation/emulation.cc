#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <random>
#include <vector>

namespace emulation {

Place place;

namespace {

const char* launch_name = "";
std::mt19937_64 random_numbers;
bool chance(int of) { return random_numbers() % of == 0; }
size_t below(size_t bound) { return random_numbers() % bound; }

// A block's shared memory: variables, then what the launch asked for.
constexpr size_t kVariableBytes = 256 * 1024, kBlockBytes = 512 * 1024;
constexpr int kAddressBits = 19;  // of a place in it
static_assert(kVariableBytes + kDynamicBytes <= kBlockBytes && kBlockBytes == size_t{1} << kAddressBits);
constexpr int kMostBlocks = 16, kMostThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) die("no memory");
  return static_cast<char*>(memory);
}
char* const blocks_memory = reserve(kMostBlocks * kBlockBytes);
char* const stacks = reserve(kMostBlocks * kMostThreads * kStackBytes);
size_t placed_bytes = 64;

struct Copy {
  void* to;
  const void* from;
  int bytes, width;
  void make() const {
    if (bytes != 0) std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, width - bytes);
  }
};

struct Block;

struct Fiber {
  Block* block;
  Place place;
  void* stack = nullptr;  // where it goes on
  int result = 0;         // of the barrier it waited at
  const std::function<bool()>* condition = nullptr;
  uint64_t cluster_phase = 0;               // at which it arrived
  std::deque<std::vector<Copy>> groups{1};  // of asynchronous copies; the last one is open
};

struct Warp {
  uint32_t arrived = 0;
  Reason reasons[32];
  uint64_t brought[32], got[32];
};

struct Block {
  char* memory;
  std::vector<Warp> warps;
  std::vector<Fiber*> at_barrier;
  Reason reason;
  int count = 0;   // of the values brought to the barrier that are true
  size_t running;  // threads that have not ended
};

struct Store {
  void* to;
  uint64_t value;
  int bytes;
  uint32_t barrier;
};

// The cluster that runs: clusters run one after another.
std::vector<Block> blocks;
std::vector<Fiber> fibers;
std::vector<Fiber*> ready, waiting;  // these for conditions
std::vector<Fiber*> resting;         // until no other goes on
bool may_hold = false;               // whether a condition may do that did not when it was last looked at
bool looked_in_vain;                 // whether the cluster is to begin anew
std::vector<Store> stores;           // under way
uint64_t cluster_phase;
size_t arrived_at_cluster;
const std::function<void()>* the_kernel;
Fiber* current;
void* scheduler;  // where it goes on

// Saves where this one is, and goes on where another one was.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
emulation_switch:
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
)");

void pause_fiber() { emulation_switch(&current->stack, scheduler); }

void open_barrier(Block& block) {
  if (block.running == 0 || block.at_barrier.size() != block.running) return;
  for (Fiber* fiber : block.at_barrier) {
    fiber->result = block.count;
    ready.push_back(fiber);
  }
  block.at_barrier.clear();
  block.count = 0;
}

void run_fiber() {
  (*the_kernel)();
  --current->block->running;
  open_barrier(*current->block);
  void* never;
  emulation_switch(&never, scheduler);
}

// A barrier in shared memory, in the 8 bytes that it has there.
struct Barrier {
  uint64_t phase : 8, arrivals : 12, missing : 12;
  int64_t bytes : 32;  // announced and not stored

  void open_if_complete() {
    if (missing != 0 || bytes != 0) return;
    may_hold = true;
    ++phase;
    missing = arrivals;
  }
};
static_assert(sizeof(Barrier) == 8);
Barrier& barrier_at(uint32_t address) { return *static_cast<Barrier*>(at(address)); }

void make_some_store() {
  std::swap(stores[below(stores.size())], stores.back());
  const Store store = stores.back();
  stores.pop_back();
  Barrier& barrier = barrier_at(store.barrier);  // whose block has not ended
  std::memcpy(store.to, &store.value, store.bytes);
  barrier.bytes = barrier.bytes - store.bytes;
  barrier.open_if_complete();
}

void look_at_conditions() {
  may_hold = false;
  const auto holds = [](Fiber* fiber) { return (*fiber->condition)(); };
  const auto end = std::partition(waiting.begin(), waiting.end(), [&](Fiber* fiber) { return !holds(fiber); });
  ready.insert(ready.end(), end, waiting.end());
  waiting.erase(end, waiting.end());
}

// Which of those that are ready: any, or one of the warp that ran last, or always one end of the list.
size_t choose(int way, const Fiber* last) {
  if (way == 1) return ready.size() - 1;
  if (way == 2) return 0;
  const size_t some = below(ready.size());
  if (way == 3 && last != nullptr) {
    for (size_t i = some; i < std::min(some + 64, ready.size()); ++i) {
      if (ready[i]->block == last->block && ready[i]->place.number / 32 == last->place.number / 32) return i;
    }
  }
  return some;
}

// False where it is to begin anew.
bool run_cluster() {
  const int way = static_cast<int>(below(4));
  current = nullptr;
  while (true) {
    if (!stores.empty() && (ready.empty() || chance(8))) make_some_store();
    if (may_hold && (ready.empty() || chance(16))) look_at_conditions();
    if (ready.empty()) {
      if (!stores.empty()) continue;
      ready.swap(resting);
      if (!ready.empty()) continue;
      if (waiting.empty()) break;
      die("threads wait for what will never be");
    }
    const size_t chosen = choose(way, current);
    current = ready[chosen];
    ready[chosen] = ready.back();
    ready.pop_back();
    place = current->place;
    emulation_switch(&scheduler, current->stack);
    if (looked_in_vain) return false;
  }
  for (const Block& block : blocks) {
    if (block.running != 0) die("threads wait for each other at different places");
  }
  return true;
}

void start_cluster(int64_t number, int cluster, dim3 grid, dim3 threads, int64_t shared_bytes) {
  const size_t of_block = size_t{threads.x} * threads.y * threads.z;
  if (of_block > kMostThreads || cluster > kMostBlocks) die("a launch of such a shape");
  blocks.assign(cluster, {});
  fibers.clear();
  ready.clear();
  waiting.clear();
  resting.clear();
  looked_in_vain = false;
  fibers.reserve(of_block * cluster);
  cluster_phase = arrived_at_cluster = 0;
  for (int b = 0; b < cluster; ++b) {
    Block& block = blocks[b];
    block.memory = blocks_memory + b * kBlockBytes;
    block.warps.resize((of_block + 31) / 32);
    block.running = of_block;
    const int dirt = static_cast<int>(below(256));
    std::memset(block.memory, dirt, placed_bytes);
    std::memset(block.memory + kVariableBytes, dirt, shared_bytes);
    const int64_t index = number * cluster + b;
    const uint3 of_grid = {static_cast<uint32_t>(index % grid.x), static_cast<uint32_t>(index / grid.x % grid.y),
                           static_cast<uint32_t>(index / grid.x / grid.y)};
    for (uint32_t t = 0; t < of_block; ++t) {
      const uint3 thread = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
      fibers.push_back({&block, {thread, of_grid, threads, grid, t}});
      // As if run_fiber had been called and paused: six registers, and where to return to.
      void** top = reinterpret_cast<void**>(stacks + fibers.size() * kStackBytes) - 3;
      *--top = reinterpret_cast<void*>(run_fiber);
      fibers.back().stack = top - 6;
      ready.push_back(&fibers.back());
    }
  }
}

}  // namespace

void die(const char* what) {
  std::printf("FAILED %s: %s; block %u, thread %u\n", launch_name, what, place.block.x, place.number);
  std::fflush(stdout);
  std::_Exit(3);
}

void begin(const char* launch, uint64_t seed) {
  launch_name = launch;
  random_numbers.seed(seed);
}

void run_grid(dim3 grid, dim3 threads, int64_t shared_bytes, int cluster, const std::function<void()>& kernel) {
  if (grid.x % cluster != 0) die("a grid of parts of clusters");
  if (shared_bytes > static_cast<int64_t>(kDynamicBytes)) die("too much shared memory");
  the_kernel = &kernel;
  std::vector<int64_t> order(int64_t{grid.x} * grid.y * grid.z / cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), random_numbers);
  for (size_t i = 0, in_vain = 0; i < order.size(); ++i) {
    start_cluster(order[i], cluster, grid, threads, shared_bytes);
    if (run_cluster()) {
      in_vain = 0;
    } else {
      order.push_back(order[i]);
      if (++in_vain == order.size() - i) die("blocks wait for what no block writes");
    }
  }
}

const uint64_t* meet_lanes(uint32_t mask, uint64_t value, Reason reason) {
  const uint32_t own = place.number % 32;
  Fiber* const warp_fibers = current - own;
  Warp& warp = current->block->warps[place.number / 32];
  if ((mask >> own & 1) == 0) die("a lane that is not in its mask");
  warp.brought[own] = value;
  warp.reasons[own] = reason;
  warp.arrived |= 1u << own;
  if ((warp.arrived & mask) != mask) {
    pause_fiber();
    return warp.got;
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    if (warp.reasons[lane] != reason) die("lanes that meet at different places");
    warp.got[lane] = warp.brought[lane];
    if (lane != own) ready.push_back(warp_fibers + lane);
  }
  warp.arrived &= ~mask;
  if (chance(4)) {
    ready.push_back(current);
    pause_fiber();
  }
  return warp.got;
}

int meet_threads(bool value, Reason reason) {
  Block& block = *current->block;
  if (!block.at_barrier.empty() && block.reason != reason) die("threads that meet at different barriers");
  block.reason = reason;
  block.count += value;
  block.at_barrier.push_back(current);
  open_barrier(block);
  pause_fiber();
  return current->result;
}

void wait_until(const std::function<bool()>& condition) {
  if (condition() && chance(2)) return;
  current->condition = &condition;
  waiting.push_back(current);
  may_hold = true;
  pause_fiber();
}

void step_aside() {
  if (!chance(64)) return;
  ready.push_back(current);
  pause_fiber();
}

void look(uint32_t times) {
  if (times == 0) return;
  if (times == 1) {
    resting.push_back(current);
  } else {
    looked_in_vain = true;
  }
  pause_fiber();
}

size_t place_variable(size_t bytes, size_t alignment) {
  const size_t offset = (placed_bytes + alignment - 1) / alignment * alignment;
  placed_bytes = offset + bytes;
  if (placed_bytes > kVariableBytes) die("too many variables in shared memory");
  return offset;
}

char* own_memory() { return current->block->memory; }
void* dynamic_memory() { return own_memory() + kVariableBytes; }

uint32_t address(const void* shared) {
  const ptrdiff_t offset = static_cast<const char*>(shared) - own_memory();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(kBlockBytes)) die("no address in the block's shared memory");
  return in_block(static_cast<uint32_t>(offset), block_of_cluster());
}

void* at(uint32_t address) {
  const uint32_t block = address >> kAddressBits;
  if (block >= blocks.size()) die("shared memory of no block");
  if (blocks[block].running == 0) die("shared memory of a block that has ended");
  return blocks_memory + address;
}

uint32_t in_block(uint32_t address, uint32_t block) {
  if (block >= blocks.size()) die("no such block in the cluster");
  return address % kBlockBytes | block << kAddressBits;
}

uint32_t block_of_cluster() { return static_cast<uint32_t>(current->block - &blocks[0]); }

void cluster_arrive() {
  current->cluster_phase = cluster_phase;
  if (++arrived_at_cluster < fibers.size()) return;
  arrived_at_cluster = 0;
  may_hold = true;
  ++cluster_phase;
}

void cluster_wait() {
  const uint64_t phase = current->cluster_phase;
  wait_until([phase] { return cluster_phase > phase; });
}

void copy_later(uint32_t to, const void* from, int bytes, int width) {
  const Copy copy = {at(to), from, bytes, width};
  if (to % width != 0 || (bytes != 0 && reinterpret_cast<uintptr_t>(from) % width != 0)) {
    die("a copy that is not aligned");
  }
  std::memset(copy.to, static_cast<int>(below(256)), width);
  if (chance(2)) {
    copy.make();
  } else {
    current->groups.back().push_back(copy);
  }
}

void commit_copies() { current->groups.emplace_back(); }

void wait_for_groups(int pending) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) > pending + 1) {
    for (const Copy& copy : groups.front()) copy.make();
    groups.pop_front();
  }
}

void wait_for_copies() {
  wait_for_groups(0);
  for (const Copy& copy : current->groups.back()) copy.make();
  current->groups.back().clear();
}

void init_barrier(uint32_t barrier, uint32_t arrivals) {
  Barrier& made = barrier_at(barrier);
  made.phase = 0;
  made.arrivals = made.missing = arrivals;
  made.bytes = 0;
}

void arrive(uint32_t barrier, uint32_t bytes) {
  Barrier& of_block = barrier_at(barrier);
  if (of_block.missing == 0) die("more arrivals than a barrier was made for");
  of_block.bytes = of_block.bytes + bytes;
  of_block.missing = of_block.missing - 1;
  of_block.open_if_complete();
}

void wait_for_barrier(uint32_t barrier, uint32_t phase) {
  const Barrier& own = barrier_at(barrier);
  wait_until([&own, phase] { return own.phase % 2 != phase % 2; });
}

void store_later(uint32_t to, uint64_t value, int bytes, uint32_t barrier) {
  if (to % bytes != 0) die("a store that is not aligned");
  if (to >> kAddressBits != barrier >> kAddressBits) die("a store that another block's barrier counts");
  stores.push_back({at(to), value, bytes, barrier});
}

}  // namespace emulation

#define USE_CUDA  // declares what the sources in csrc/cuda call
#include "stable_runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <thread>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace host {

Settings& settings() {
  static Settings s;
  return s;
}
void Settings::set(const std::string& name, int64_t value) {
  const std::pair<const char*, int64_t*> all[] = {{"cuda", &cuda}, {"multiprocessors", &multiprocessors},
      {"shared_limit", &shared_limit}, {"threads", &threads}, {"schedule", &schedule}, {"alignment", &alignment},
      {"most_blocks", &most_blocks}};
  for (const auto& [known, to] : all)
    if (name == known) {
      *to = value;
      return;
    }
  throw std::runtime_error("no setting " + name);
}
int64_t& parallel_regions() {
  static int64_t n = 0;
  return n;
}

int64_t item_size(int32_t dtype) {
  switch (dtype) {
    case 0: case 1: case 11: return 1;
    case 2: case 5: case 15: return 2;
    case 3: case 6: return 4;
    case 4: case 7: return 8;
    default: throw std::runtime_error("dtype " + std::to_string(dtype) + " is unknown here");
  }
}

int64_t span(const AtenTensorOpaque& t) {
  int64_t last = 0;
  for (size_t i = 0; i < t.sizes.size(); i++) {
    if (t.sizes[i] == 0) return 0;
    last += (t.sizes[i] - 1) * t.strides[i];
  }
  return (last + 1) * item_size(t.dtype);
}

std::shared_ptr<void> allocate(int64_t bytes, int64_t offset, [[maybe_unused]] int64_t alignment) {
#if defined(FA_GUARD_PAGES)
  offset %= alignment;
  const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + offset + page) / page * page, all = inside + 2 * page;
  char* p = static_cast<char*>(mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (p == MAP_FAILED || mprotect(p + page, inside, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  char* data = p + page + offset;
  if (settings().schedule % 2 == 0) data += (inside - bytes - offset) / alignment * alignment;
  std::shared_ptr<void> out(data, [=](void*) { munmap(p, all); });
#else
  void* p = nullptr;
  if (posix_memalign(&p, 256, offset + bytes)) throw std::bad_alloc();
  char* data = static_cast<char*>(p) + offset;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, offset);
#endif
  std::shared_ptr<void> out(data, [=](void*) { std::free(p); });
#endif
  std::memset(data, 0xff, bytes);
  return out;
}

namespace {

template <class T>
StableIValue bits(T v) {
  StableIValue out = 0;
  std::memcpy(&out, &v, sizeof(v));
  return out;
}
template <class T>
T as(StableIValue v) {
  T out;
  std::memcpy(&out, &v, sizeof(out));
  return out;
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
std::map<std::string, Boxed>& leaves() {
  static std::map<std::string, Boxed> all;
  return all;
}

AtenTensorOpaque* empty(std::vector<int64_t> sizes, std::vector<int64_t> strides, int32_t dtype) {
  AtenTensorOpaque t{nullptr, dtype, std::move(sizes), std::move(strides), nullptr};
  t.memory = allocate(span(t), 0, settings().alignment);
  t.data = t.memory.get();
  return new AtenTensorOpaque(std::move(t));
}

bool is_contiguous(const AtenTensorOpaque& t) {
  int64_t stride = 1;
  for (size_t d = t.sizes.size(); d-- > 0; stride *= t.sizes[d])
    if (span(t) && t.sizes[d] > 1 && t.strides[d] != stride) return false;
  return true;
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

// The elements of t, in order.
void copy_elements(const AtenTensorOpaque& t, char* out) {
  const int64_t item = item_size(t.dtype), bytes = std::accumulate(t.sizes.begin(), t.sizes.end(), item, std::multiplies<>());
  for (int64_t at = 0; at < bytes; at += item) {
    int64_t offset = 0, index = at / item;
    for (size_t d = t.sizes.size(); d-- > 0; index /= t.sizes[d]) offset += index % t.sizes[d] * t.strides[d];
    std::memcpy(out + at, static_cast<const char*>(t.data) + offset * item, item);
  }
}

}  // namespace

StableIValue pass(bool v) { return bits(v); }
StableIValue pass(int64_t v) { return bits(v); }
StableIValue pass(double v) { return bits(v); }
StableIValue pass(const AtenTensorOpaque& t) { return bits(new AtenTensorOpaque(t)); }
StableIValue pass(const std::vector<bool>& v) {
  auto* list = new StableListOpaque;
  for (bool item : v) list->items.push_back(bits(item));
  return bits(list);
}
StableIValue pass_optional(const StableIValue* value) { return bits(value ? new StableIValue(*value) : nullptr); }

std::vector<AtenTensorOpaque> call(const std::string& leaf, std::vector<StableIValue> stack, size_t outputs) {
  const auto found = leaves().find(leaf);
  if (found == leaves().end()) throw std::runtime_error("no leaf " + leaf + " was compiled");
  const size_t count = stack.size();
  stack.resize(std::max(count, outputs));
  found->second(stack.data(), count, outputs);
  std::vector<AtenTensorOpaque> out;
  for (size_t i = 0; i < outputs; i++) {
    std::unique_ptr<AtenTensorOpaque> t(as<AtenTensorOpaque*>(stack[i]));
    int64_t elements = 1;
    for (int64_t size : t->sizes) elements *= size;
    if (span(*t) != elements * item_size(t->dtype)) throw std::runtime_error(leaf + ": an output has holes");
    out.push_back(*t);
  }
  return out;
}

}  // namespace host

using namespace host;

extern "C" {

uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }

#define FA_DTYPE(name, code) \
  int32_t aoti_torch_dtype_##name() { return code; }  // of ScalarType
FA_DTYPE(uint8, 0) FA_DTYPE(int8, 1) FA_DTYPE(int16, 2) FA_DTYPE(int32, 3) FA_DTYPE(int64, 4) FA_DTYPE(float16, 5)
FA_DTYPE(float32, 6) FA_DTYPE(float64, 7) FA_DTYPE(complex32, 8) FA_DTYPE(complex64, 9) FA_DTYPE(complex128, 10)
FA_DTYPE(bool, 11) FA_DTYPE(bfloat16, 15) FA_DTYPE(float8_e5m2, 23) FA_DTYPE(float8_e4m3fn, 24)
FA_DTYPE(float8_e5m2fnuz, 25) FA_DTYPE(float8_e4m3fnuz, 26) FA_DTYPE(uint16, 27) FA_DTYPE(uint32, 28) FA_DTYPE(uint64, 29)

#define FA_CODE(name, code) \
  int32_t aoti_torch_##name() { return code; }
FA_CODE(device_type_cpu, 0) FA_CODE(device_type_cuda, 1) FA_CODE(device_type_xpu, 12) FA_CODE(device_type_mps, 13)
FA_CODE(device_type_meta, 14) FA_CODE(device_type_privateuse1, 20) FA_CODE(layout_strided, 0) FA_CODE(layout_sparse_coo, 1)
FA_CODE(layout_sparse_csr, 2) FA_CODE(layout__mkldnn, 3) FA_CODE(layout_sparse_csc, 4) FA_CODE(layout_sparse_bsr, 5)
FA_CODE(layout_sparse_bsc, 6) FA_CODE(layout_jagged, 7)

// --- tensors ---------------------------------------------------------------------------------------------------------------

AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* out) {
  *out = new AtenTensorOpaque{};
  return 0;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle t, AtenTensorHandle* out) {
  *out = new AtenTensorOpaque(*t);
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  delete t;
  return 0;
}
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** out) {
  *out = t->data;
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** out) {
  *out = t->data;
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** out) {
  *out = t->data;
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* out) {
  *out = t->dtype;
  return 0;
}
size_t aoti_torch_dtype_element_size(int32_t dtype) { return item_size(dtype); }
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* out) {
  *out = settings().cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* out) {
  *out = 0;
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* out) {
  *out = t->sizes.size();
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* out) {
  *out = 1;
  for (int64_t size : t->sizes) *out *= size;
  return 0;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** out) {
  *out = t->sizes.data();
  return 0;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** out) {
  *out = t->strides.data();
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* out) {
  *out = t->sizes.at(d < 0 ? d + t->sizes.size() : d);
  return 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* out) {
  *out = t->strides.at(d < 0 ? d + t->strides.size() : d);
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
    int32_t, AtenTensorHandle* out) {
  *out = empty({sizes, sizes + dims}, {strides, strides + dims}, dtype);
  return 0;
}

AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle t, bool* out) {
  *out = is_contiguous(*t);
  return 0;
}
// A storage begins where its tensor does.
AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle, int64_t* out) {
  *out = 0;
  return 0;
}
AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle t, int64_t* out) {
  *out = span(*t);
  return 0;
}
AOTITorchError aoti_torch__reinterpret_tensor(AtenTensorHandle t, int64_t dims, const int64_t* sizes, const int64_t* strides,
    int64_t offset, AtenTensorHandle* out) {
  char* data = static_cast<char*>(t->data) + offset * item_size(t->dtype);
  *out = new AtenTensorOpaque{data, t->dtype, {sizes, sizes + dims}, {strides, strides + dims}, t->memory};
  return 0;
}

// --- lists, the dispatcher, threads ----------------------------------------------------------------------------------------

AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* out) {
  *out = new StableListOpaque;
  return 0;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue item) {
  list->items.push_back(item);
  return 0;
}
AOTITorchError torch_list_size(StableListHandle list, size_t* out) {
  *out = list->items.size();
  return 0;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* out) {
  *out = list->items.at(i);
  return 0;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete list;
  return 0;
}

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle* out) {
  *out = nullptr;
  return 0;
}
AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle*) { return 1; }
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*) { return 1; }
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError torch_library_impl(
    TorchLibraryHandle, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  leaves()[name] = fn;
  return 0;
}

// The operators that the sources call, by the few arguments that they give.
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t) {
  const std::string full = std::string(name) + (*overload ? "." : "") + overload;
  std::unique_ptr<AtenTensorOpaque> self(as<AtenTensorOpaque*>(stack[0]));
  if (full == "aten::transpose.int") {  // (self, dim0, dim1)
    std::swap(self->sizes.at(as<int64_t>(stack[1])), self->sizes.at(as<int64_t>(stack[2])));
    std::swap(self->strides.at(as<int64_t>(stack[1])), self->strides.at(as<int64_t>(stack[2])));
    stack[0] = bits(self.release());
    return 0;
  }
  if (full != "aten::new_empty" && full != "aten::reshape") throw std::runtime_error("no operator " + full + " here");
  std::unique_ptr<StableListOpaque> list(as<StableListOpaque*>(stack[1]));
  std::vector<int64_t> sizes;
  for (StableIValue item : list->items) sizes.push_back(as<int64_t>(item));
  if (full == "aten::reshape") {  // (self, shape); always a copy
    AtenTensorOpaque* out = empty(sizes, contiguous_strides(sizes), self->dtype);
    copy_elements(*self, static_cast<char*>(out->data));
    stack[0] = bits(out);
    return 0;
  }
  std::unique_ptr<StableIValue> dtype(as<StableIValue*>(stack[2]));  // (self, size, dtype, layout, device, pin_memory)
  for (int i = 3; i < 6; i++)
    if (stack[i]) throw std::runtime_error("aten::new_empty: only size and dtype are known here");
  stack[0] = bits(empty(sizes, contiguous_strides(sizes), dtype ? as<int32_t>(*dtype) : self->dtype));
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = static_cast<uint32_t>(settings().threads);
  return 0;
}
// Chunks like those of PyTorch, each on a thread of its own, so that ThreadSanitizer knows them.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f, void* context) {
  if (begin >= end) return 0;
  const int64_t count = end - begin, most = (count + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t chunks = std::min(most, settings().threads);
  parallel_regions() += chunks > 1;
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < chunks; i++)
    threads.emplace_back([=] { f(begin + count * i / chunks, begin + count * (i + 1) / chunks, context); });
  f(begin, begin + count / chunks, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// The stream of an emulated device is the number of a schedule.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** out) {
  *out = reinterpret_cast<void*>(settings().schedule);
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* out) {
  *out = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  if (error) throw std::runtime_error("CUDA error " + std::to_string(error));
  return 0;
}
void torch_c10_cuda_free_error_msg(char*) {}
}

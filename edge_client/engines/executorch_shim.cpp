// A C interface over ExecuTorch: open a program, ask for a method's values, run it on given memory.
//
// Every function returns 0 or ExecuTorch's error, and says in `lamina_error` what it was about. All that a
// method is fed and gives lies in the caller's memory, which is checked by the caller.

#include "executorch_shim.h"

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include <executorch/extension/data_loader/file_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

namespace et = executorch::runtime;
using executorch::extension::FileDataLoader;
using executorch::extension::MallocMemoryAllocator;

extern "C" pthreadpool* pthreadpool_create(size_t);
extern "C" void pthreadpool_destroy(pthreadpool*);
extern "C" int xnn_initialize(const void*);
extern "C" int xnn_delete_operator(xnn_operator*);

thread_local Workshop* lamina_current = nullptr;

namespace {

thread_local std::string error_text;

void keep_message(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* text, size_t size) {
  if (level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal) error_text.assign(text, size);
}

executorch::aten::DimOrderType kOrder[] = {0, 1, 2, 3, 4, 5, 6, 7};

struct Loaded {
  MallocMemoryAllocator allocator, temporary;
  std::vector<et::Span<uint8_t>> spans;
  std::unique_ptr<et::HierarchicalAllocator> planned;
  std::unique_ptr<et::MemoryManager> manager;
  std::unique_ptr<et::Method> method;
};

struct Opened {
  Workshop workshop;
  Pages arena;  // one for all methods
  std::unique_ptr<FileDataLoader> loader;
  std::unique_ptr<et::Program> program;
  std::unordered_map<std::string, Loaded> methods;

  ~Opened() {
    methods.clear();
    for (xnn_operator* op : workshop.products)
      if (op) xnn_delete_operator(op);
    if (workshop.pool) pthreadpool_destroy(workshop.pool);
  }
};

int load(Opened& opened, const std::string& name) {
  if (opened.methods.count(name)) return 0;
  Loaded& loaded = opened.methods[name];
  loaded.spans.push_back({opened.arena.data, opened.arena.size});
  loaded.planned = std::make_unique<et::HierarchicalAllocator>(et::Span<et::Span<uint8_t>>(loaded.spans.data(), 1));
  loaded.manager =
      std::make_unique<et::MemoryManager>(&loaded.allocator, loaded.planned.get(), &loaded.temporary);
  auto method = opened.program->load_method(
      name.c_str(), loaded.manager.get(), nullptr, nullptr, nullptr, lamina_kernels());
  if (method.ok()) loaded.method = std::make_unique<et::Method>(std::move(*method));
  if (!method.ok()) opened.methods.erase(name);
  return static_cast<int>(method.error());
}

}  // namespace

extern "C" {

struct LaminaValue {  // a tensor; the sizes of a method's are the largest that they may be
  void* data;
  int32_t type, dims, sizes[8];
};

const char* lamina_error() { return error_text.c_str(); }

void lamina_close(Opened* opened) { delete opened; }

int lamina_open(const char* path, int threads, Opened** result) {
  static const bool quiet = et::register_pal(et::PalImpl::create(keep_message, __FILE__));
  (void)quiet;
  et::runtime_init();
  error_text.clear();
  if (xnn_initialize(nullptr) != 0) return static_cast<int>(et::Error::NotSupported);
  auto opened = std::make_unique<Opened>();
  auto loader = FileDataLoader::from(path);
  if (!loader.ok()) return static_cast<int>(loader.error());
  opened->loader = std::make_unique<FileDataLoader>(std::move(*loader));
  auto program = et::Program::load(opened->loader.get(), et::Program::Verification::InternalConsistency);
  if (!program.ok()) return static_cast<int>(program.error());
  opened->program = std::make_unique<et::Program>(std::move(*program));
  size_t planned = 0;
  for (size_t i = 0; i < opened->program->num_methods(); i++) {
    auto meta = opened->program->method_meta(*opened->program->get_method_name(i));
    if (!meta.ok()) return static_cast<int>(meta.error());
    if (meta->num_memory_planned_buffers() > 1) return static_cast<int>(et::Error::NotSupported);
    if (meta->num_memory_planned_buffers() == 1)
      planned = std::max<size_t>(planned, *meta->memory_planned_buffer_size(0));
  }
  if (planned && !opened->arena.grow(planned)) return static_cast<int>(et::Error::MemoryAllocationFailed);
  opened->workshop.pool = pthreadpool_create(threads);
  *result = opened.release();
  return 0;
}

// Describes a method's inputs (which = 0) or outputs (1): how many, and the first `room` of them.
int lamina_values(Opened* opened, const char* name, int which, int room, LaminaValue* values, int* count) {
  error_text.clear();
  auto meta = opened->program->method_meta(name);
  if (!meta.ok()) return static_cast<int>(meta.error());
  *count = static_cast<int>(which ? meta->num_outputs() : meta->num_inputs());
  for (int i = 0; i < *count && i < room; i++) {
    auto info = which ? meta->output_tensor_meta(i) : meta->input_tensor_meta(i);
    if (!info.ok()) return static_cast<int>(info.error());
    if (info->sizes().size() > 8) return static_cast<int>(et::Error::NotSupported);
    values[i].type = static_cast<int32_t>(info->scalar_type());
    values[i].dims = static_cast<int32_t>(info->sizes().size());
    std::copy(info->sizes().begin(), info->sizes().end(), values[i].sizes);
  }
  return 0;
}

// Inputs and outputs are all of the method's. An output's memory has room for its largest sizes; the sizes
// that it has come back.
int lamina_run(Opened* opened, const char* name, int inputs, LaminaValue* in, int outputs, LaminaValue* out) {
  error_text.clear();
  lamina_current = &opened->workshop;
  if (int status = load(*opened, name)) return status;
  et::Method& method = *opened->methods[name].method;
  if (method.inputs_size() != static_cast<size_t>(inputs) || method.outputs_size() != static_cast<size_t>(outputs))
    return static_cast<int>(et::Error::InvalidArgument);
  for (int i = 0; i < inputs; i++) {
    executorch::aten::TensorImpl tensor(
        static_cast<executorch::aten::ScalarType>(in[i].type), in[i].dims, in[i].sizes, in[i].data, kOrder);
    auto status = method.set_input(executorch::aten::Tensor(&tensor), i);
    if (status != et::Error::Ok) return static_cast<int>(status);
  }
  for (int i = 0; i < outputs; i++) {
    auto status = method.set_output_data_ptr(out[i].data, SIZE_MAX, i);
    if (status != et::Error::Ok) return static_cast<int>(status);
  }
  executorch::extension::threadpool::NoThreadPoolGuard ours_only;  // ExecuTorch's own pool has every core
  auto status = method.execute();
  for (int i = 0; status == et::Error::Ok && i < outputs; i++) {
    auto sizes = method.get_output(i).toTensor().sizes();
    std::copy(sizes.begin(), sizes.end(), out[i].sizes);
  }
  return static_cast<int>(status);
}

}  // extern "C"

// A stand-in accelerator: its tensors lie in the host's memory, every operator computes on the CPU, and the rules are
// CUDA's. Operands on two devices are refused, new memory is never zero, random numbers have a stream of their own, and
// a listener hears of everything that would make the host wait for the device. Written for torch 2.13.
//
// It includes headers of torch and none of Python, which calls it through torch.ops.second_device.

#define AT_PER_OPERATOR_HEADERS
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>

namespace {

using at::Tensor;
using c10::IValue;

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// ---- Memory ----------------------------------------------------------------------------------------------------------

// The CPU's memory under another device's name.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    if (bytes) std::memset(memory.get(), 0xFF, bytes);  // NaN, so that nothing works by relying on zeros
    memory.unsafe_set_device(kDevice);
    return memory;
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator g_allocator;
REGISTER_ALLOCATOR(kType, &g_allocator);

// Pinned memory of the host, to which the host can copy without a wait: the CPU's memory, and a list of its addresses.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
    void* start = memory.get();
    std::lock_guard<std::mutex> lock(mutex());
    blocks().insert(start);
    return {start, memory.release_context(), &free, c10::Device(c10::kCPU)};
  }
  static void free(void* start) {
    std::lock_guard<std::mutex> lock(mutex());
    blocks().erase(start);
    c10::GetCPUAllocator()->raw_deleter()(start);
  }
  static bool holds(const void* start) {
    std::lock_guard<std::mutex> lock(mutex());
    return start != nullptr && blocks().count(start);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  // Never destroyed: tensors outlive the library's own objects when the process ends.
  static std::unordered_set<const void*>& blocks() { static auto* all = new std::unordered_set<const void*>; return *all; }
  static std::mutex& mutex() { static auto* one = new std::mutex; return *one; }
};
PinnedAllocator g_pinned;

// ---- One device, one stream, one generator ---------------------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(kDevice); }
  c10::Stream getNewStream(c10::Device, int) const override { return getStream(kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(kDevice); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = kDevice;
    key_set_ = kKeys;
  }
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &g_pinned; }
  bool isPinnedPtr(const void* start) const override { return PinnedAllocator::holds(start); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

// ---- What would make the host wait -----------------------------------------------------------------------------------

using Listener = void (*)(const char* what, const char* op);
Listener g_listener = nullptr;
thread_local bool t_computing = false;

// Set while an operator computes: the copies that it makes then are the stand-in's, not the caller's.
struct Computing {
  ~Computing() { t_computing = before; }
  const bool before = std::exchange(t_computing, true);
};

void waits(const char* what, const std::string& op) {
  if (g_listener != nullptr && !t_computing) g_listener(what, op.c_str());
}

// ---- Operators with a kernel of their own: memory, views, copies -----------------------------------------------------

bool ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& tensor) {
  if (!ours(tensor)) return tensor;
  void* start = const_cast<void*>(tensor.const_data_ptr());
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(start, tensor.sizes(), tensor.strides(), [held = tensor.storage()](void*) {}, options);
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &g_allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &g_allocator, kKeys, c10::dtype_or_default(dtype));
}

// Copies as torch does on CUDA: the host waits, unless the copy is non-blocking and, if it goes to the host, to pinned
// memory.
Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (!ours(target) && !(non_blocking && PinnedAllocator::holds(target.storage().data()))) waits("to host", "copy_");
  if (!ours(source) && !non_blocking) waits("from host", "copy_");
  if (target.numel() > 0) on_host(target).copy_(on_host(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  at::native::resize_(target, source.sizes());
  return copy_from(source, target, false);
}

at::Scalar local_scalar_dense(const Tensor& tensor) {
  waits("item", "item");
  return on_host(tensor).item();
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("set_.source_Storage", TORCH_FN(static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_)));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
}

// ---- Every other operator --------------------------------------------------------------------------------------------

template <typename Visit>
void each_tensor(const IValue& value, const Visit& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& part : value.toListRef()) each_tensor(part, visit);
  }
}

// Refuses what CUDA refuses, and reports what makes the host wait on CUDA.
void check(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const std::string& name = op.schema().name();
  const auto& arguments = op.schema().arguments();
  const auto first = stack.end() - arguments.size();
  const bool getting = name == "aten::index", putting = name == "aten::_index_put_impl_";
  // A single number on the host is passed to a kernel by value. The tag is that of TensorIterator's operators.
  const bool takes_numbers =
      op.hasTag(at::Tag::pointwise) || putting || name == "aten::fill_" || name == "aten::masked_fill_";
  bool any_ours = false, masked = false;
  std::string foreign;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const bool index = (getting || putting) && arguments[i].name() == "indices";  // may lie on the host
    const bool written = arguments[i].alias_info() != nullptr && arguments[i].alias_info()->isWrite();
    each_tensor(*(first + i), [&](const Tensor& tensor) {
      const bool number = tensor.unsafeGetTensorImpl()->is_wrapped_number() ||
                          (tensor.dim() == 0 && takes_numbers && !written);
      any_ours |= ours(tensor);
      masked |= ours(tensor) && index && tensor.scalar_type() == at::kBool;
      if (!ours(tensor) && !index && !number) foreign += c10::str(" ", arguments[i].name(), tensor.sizes());
    });
  }
  TORCH_CHECK(!any_ours || foreign.empty(), "Expected all tensors to be on the same device, but of ",
              op.operator_name(), " these are on the CPU and others on the second device:", foreign);
  if (putting) {  // A mask becomes as many indices as it has ones, except where it is filled with one number.
    const bool filled = (first + 2)->toTensor().numel() == 1 && !(first + 3)->toBool();
    if (masked && !filled) waits("as many as there are", name);
  } else if (op.hasTag(at::Tag::dynamic_output_shape) && !getting) {  // aten::index calls aten::nonzero for a mask
    waits("as many as there are", name);
  }
  if (op.hasTag(at::Tag::data_dependent_output)) waits("item", name);
}

// Draws come from this device's generator, which stands in for the CPU's meanwhile.
struct DrawsFrom {
  DrawsFrom(const c10::OperatorHandle& op, torch::jit::Stack* stack) : source(default_generator()) {
    for (auto value = stack->end() - op.schema().arguments().size(); value != stack->end(); ++value) {
      if (!value->isGenerator()) continue;
      source = value->toGenerator();
      TORCH_CHECK(source.device().type() == kType, "Expected a generator of the second device but found one of ",
                  source.device());
      *value = IValue();
    }
    exchange();
  }
  ~DrawsFrom() { exchange(); }
  void exchange() {
    auto kept = cpu.get_state();
    cpu.set_state(source.get_state());
    source.set_state(kept);
  }
  at::Generator cpu = at::detail::getDefaultCPUGenerator(), source;
};

void compute_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check(op, *stack);
  Computing computing;
  std::optional<DrawsFrom> drawing;
  if (op.hasTag(at::Tag::nondeterministic_seeded)) drawing.emplace(op, stack);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_host>()); }

// ---- Mixed precision: CUDA's lists of operators ----------------------------------------------------------------------

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define NARROW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define WIDE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define WIDE_OUTPUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST_OPERAND(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  using namespace at::autocast;
  AT_FORALL_LOWER_PRECISION_FP(NARROW)
  AT_FORALL_FP32(WIDE)
  AT_FORALL_FP32_SET_OPT_DTYPE(WIDE_OUTPUT)
  AT_FORALL_PROMOTE(WIDEST_OPERAND)
}

// ---- For Python ------------------------------------------------------------------------------------------------------

TORCH_LIBRARY(second_device, m) {
  m.def("register_hooks() -> ()", [] {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
  });
  m.def("synchronize() -> ()", [] { waits("synchronize", "synchronize"); });
  m.def("listen(int listener) -> ()", [](int64_t listener) { g_listener = reinterpret_cast<Listener>(listener); });
  m.def("seed(int seed) -> ()", [](int64_t seed) { default_generator().set_current_seed(seed); });
  m.def("rng_state() -> Tensor", [] { return Tensor(default_generator().get_state()); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) { default_generator().set_state(state); });
}

}  // namespace

// A "CUDA device" whose memory is the computer's and whose kernels are the CPU's, for machines that have none.
//
// What it keeps of the real thing is what code gets wrong: tensors say that they are on cuda:0, an operator refuses
// operands on different devices (a CPU tensor without axes is allowed, as on the real device, and so are CPU indices),
// and data gets there and back by copies only. It needs a torch built without CUDA, and is slow.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <unordered_set>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr plain = c10::GetCPUAllocator()->allocate(bytes);
    void* data = plain.get();
    auto deleter = plain.get_deleter();
    return {data, plain.release_context(), deleter, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Memory memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

}  // namespace

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {

at::Tensor tensor_of(c10::Storage storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  return made;
}

// The same memory as a tensor of the CPU.
at::Tensor host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) {
    return tensor;
  }
  void* data = tensor.storage().mutable_data();
  c10::Storage storage(
      c10::Storage::use_byte_size_t(),
      tensor.storage().nbytes(),
      c10::DataPtr(data, c10::Device(c10::DeviceType::CPU)),
      nullptr,
      false);
  return tensor_of(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
}

void drop(void* held) { delete static_cast<c10::Storage*>(held); }

// A result of the CPU's, from now on on the device; nothing is copied.
c10::Storage taken(const at::Tensor& result) {
  auto* held = new c10::Storage(result.storage());
  return c10::Storage(
      c10::Storage::use_byte_size_t(),
      held->nbytes(),
      c10::DataPtr(held->mutable_data(), held, &drop, kDevice),
      &memory,
      true);
}

struct Given {
  at::Tensor theirs;
  at::Tensor ours;
  bool replaced;  // an empty result that the operator sizes
};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    const auto first = stack_->size() - arguments.size();
    for (size_t index = 0; index < arguments.size(); ++index) {
      const auto* alias = arguments[index].alias_info();
      replace((*stack_)[first + index], alias != nullptr && alias->isWrite(), index == 0);
    }
    check();
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (const auto& given : given_) {
      if (given.replaced) {
        auto* impl = given.theirs.unsafeGetTensorImpl();
        impl->set_storage_keep_dtype(taken(given.ours));
        impl->set_sizes_and_strides(given.ours.sizes(), given.ours.strides());
      }
    }
    const auto results = op_.schema().returns().size();
    for (size_t index = stack_->size() - results; index < stack_->size(); ++index) {
      bring_back((*stack_)[index]);
    }
  }

 private:
  at::Tensor note(const at::Tensor& tensor, bool written, bool first) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (!tensor.is_cuda()) {
      foreign_ = foreign_ || tensor.dim() > 0 || written;
      first_foreign_ = first_foreign_ || (first && tensor.dim() > 0);
      return tensor;
    }
    const bool replaced = written && tensor.numel() == 0;
    at::Tensor ours = replaced ? at::empty({0}, tensor.options().device(c10::kCPU)) : host(tensor);
    given_.push_back({tensor, ours, replaced});
    return ours;
  }

  void replace(c10::IValue& value, bool written, bool first) {
    if (value.isTensor()) {
      value = note(value.toTensor(), written, first);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(note(tensor, written, first));
      }
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor.has_value() ? std::optional<at::Tensor>(note(*tensor, written, first)) : std::nullopt);
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::DeviceType::CPU);
      on_device_ = true;
    }
  }

  void check() const {
    static const std::unordered_set<std::string> indexed{
        "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
    const bool may_mix = indexed.count(op_.schema().name()) > 0 && !first_foreign_;
    TORCH_CHECK(
        !foreign_ || given_.empty() || may_mix,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
        op_.schema().operator_name(),
        ")");
  }

  void bring_back(c10::IValue& value) const {
    if (value.isTensor()) {
      value = on_device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(on_device(tensor));
      }
      value = list;
    }
  }

  at::Tensor on_device(const at::Tensor& result) const {
    if (!result.defined() || (given_.empty() && !on_device_)) {
      return result;
    }
    for (const auto& given : given_) {
      if (result.is_same(given.ours)) {
        return given.theirs;
      }
      if (result.numel() > 0 && result.storage().data() == given.ours.storage().data()) {
        return tensor_of(given.theirs.storage(), kKeys, result);
      }
    }
    return tensor_of(taken(result), kKeys, result);
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::vector<Given> given_;
  bool foreign_ = false;
  bool first_foreign_ = false;
  bool on_device_ = false;
};

std::atomic<long> calls{0};

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++calls;
  Call(op, stack).run();
}

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  host(self).copy_(host(source));
  return self;
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format.has_value()) {
    impl->empty_tensor_restride(*format);
  }
  const size_t bytes = (self.storage_offset() + self.numel()) * self.element_size();
  if (bytes > self.storage().nbytes()) {
    c10::DataPtr larger = memory.allocate(bytes);
    std::memcpy(larger.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(larger));
    self.storage().set_nbytes(bytes);
  }
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("resize_", resize_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
}

struct Registered {
  Registered() { c10::SetAllocator(kDevice.type(), &memory); }
} registered;

}  // namespace

// How many operators the device has run so far: a test can see that it was used.
extern "C" long device_calls() { return calls; }

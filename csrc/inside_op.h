// For ops that are composed of library products and of other ops.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace dora_ext {

// The inner products neither record autograd (each op's gradient is an op of its own) nor get cast by autocast (the
// caller has chosen the dtype).
struct InsideOp {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard below_autocast{c10::autocast_dispatch_keyset};
};

// One of our own ops, through the dispatcher; look it up once: `static auto op = find_op<...>(...)`.
template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace dora_ext

// The Python module object: importing it registers the ops (ops.cpp and the backends' files do so when they are
// loaded) and tells how it was built. Everything else goes through torch.ops.dora_ext.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#define DORA_EXT_STRING_(...) #__VA_ARGS__
#define DORA_EXT_STRING(...) DORA_EXT_STRING_(__VA_ARGS__)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of dora_ext";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("architectures") = DORA_EXT_STRING(DORA_EXT_ARCHITECTURES);  // "" in a CPU-only build, else "7.5,8.0,..."
  m.attr("compiler") = std::string("C++ ") + __VERSION__;
  m.attr("cxx_standard") = static_cast<long>(__cplusplus);
}

#include "driver.h"

namespace aqua {
namespace cuda {
namespace {

// The interface of CUDA 12.0, which all that is used here is older than.
constexpr unsigned kVersion = 12000;

template <typename Function>
void find(const char* name, Function* out, std::string* missing) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
  if (status == cudaSuccess && found == cudaDriverEntryPointSuccess && address != nullptr) {
    *out = reinterpret_cast<Function>(address);
    return;
  }
  if (!missing->empty()) return;
  *missing = std::string(name) + ": " +
             (status == cudaSuccess ? "not in this driver" : cudaGetErrorString(status));
  cudaGetLastError();
}

}  // namespace

const Driver& driver() {
  static const Driver found = [] {
    Driver d;
    find("cuMemCreate", &d.create, &d.missing);
    find("cuMemRelease", &d.release, &d.missing);
    find("cuMemAddressReserve", &d.reserve, &d.missing);
    find("cuMemAddressFree", &d.unreserve, &d.missing);
    find("cuMemMap", &d.map, &d.missing);
    find("cuMemUnmap", &d.unmap, &d.missing);
    find("cuMemSetAccess", &d.set_access, &d.missing);
    find("cuMemGetAllocationGranularity", &d.granularity, &d.missing);
    find("cuMemExportToShareableHandle", &d.export_handle, &d.missing);
    find("cuMemImportFromShareableHandle", &d.import_handle, &d.missing);
    find("cuDeviceGet", &d.device_get, &d.missing);
    find("cuDeviceGetAttribute", &d.device_attribute, &d.missing);
    find("cuGetErrorString", &d.error_string, &d.missing);
    return d;
  }();
  return found;
}

std::string describe(CUresult status) {
  const char* text = nullptr;
  if (driver().error_string != nullptr) driver().error_string(status, &text);
  return text != nullptr ? text : "CUDA driver error " + std::to_string(static_cast<int>(status));
}

}  // namespace cuda
}  // namespace aqua

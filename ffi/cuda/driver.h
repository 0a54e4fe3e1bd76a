// The driver's functions, found at run time: the library must load where there is no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

namespace aqua {
namespace cuda {

struct Driver {
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) unreserve = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&cuDeviceGet) device_get = nullptr;
  decltype(&cuDeviceGetAttribute) device_attribute = nullptr;
  decltype(&cuGetErrorString) error_string = nullptr;
  std::string missing;  // why it can't be used; empty if it can
};

// Looks the functions up once. Initialises CUDA if there is a driver.
const Driver& driver();

// An error of the driver in words.
std::string describe(CUresult status);

// What aqua_arena_error (arena.h) says next in this thread.
void set_arena_error(const std::string& what);

}  // namespace cuda
}  // namespace aqua

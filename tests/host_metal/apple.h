// What metal_cpp's headers take from macOS: names, nothing that runs but the
// message passing that mock_metal.cpp defines.

#pragma once

#include <cstddef>
#include <cstdint>

struct objc_object {};
using id = objc_object*;
using Class = struct objc_class*;
using Protocol = objc_object;
using SEL = const char*; // a selector is its name

extern "C" {
uintptr_t
objc_msgSend(void* self, SEL selector, uintptr_t a, uintptr_t b, uintptr_t c);
void objc_msgSend_stret();
void objc_msgSend_fpret();
}

inline SEL sel_registerName(const char* name) {
  return name;
}
inline Class objc_lookUpClass(const char*) {
  return nullptr;
}
inline Protocol* objc_getProtocol(const char*) {
  return nullptr;
}

using CFTimeInterval = double;
using IOSurfaceRef = struct __IOSurface*;
using dispatch_queue_t = struct dispatch_queue_s*;
using dispatch_data_t = struct dispatch_data_s*;
using kern_return_t = int;
using task_id_token_t = unsigned;

# macOS on arm64, on any host: $ENV{ZIG} and the stubs beside this file.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)

# These are for this host's compiler.
unset(ENV{CXXFLAGS})
unset(ENV{LDFLAGS})

set(CMAKE_CXX_COMPILER "${CMAKE_CURRENT_LIST_DIR}/zig-c++")
set(CMAKE_CXX_COMPILER_TARGET aarch64-macos.14.0)
set(CMAKE_CXX_FLAGS_INIT
    "-Wall -idirafter \"${CMAKE_CURRENT_LIST_DIR}/include\"")
set(CMAKE_COMPILE_WARNING_AS_ERROR ON)
# A Mac has its own libc++, so do not build zig's.
set(CMAKE_MODULE_LINKER_FLAGS_INIT -nostdlib++)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)

# The host's ar writes an index that a Mach-O linker cannot read.
set(CMAKE_AR "$ENV{ZIG}")
set(CMAKE_CXX_ARCHIVE_CREATE "<CMAKE_AR> ar qcs <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")

# CMake requires a tool here. Nothing is installed: link the final rpath.
set(CMAKE_INSTALL_NAME_TOOL "${CMAKE_COMMAND}")
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)

# Debian: apt-get install clang-19 g++-aarch64-linux-gnu qemu-user. armv8-a is what every Jetson runs.
# clang, because gcc 12 spills the register tile; -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ for gcc.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
if(NOT CMAKE_CXX_COMPILER)
  set(CMAKE_CXX_COMPILER clang++-19)
endif()
set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-gnu)
set(CMAKE_CXX_FLAGS_INIT "-march=armv8-a -mtune=cortex-a57")
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)  # QEMU_CPU says which one.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)

// A qemu plugin that counts the instructions a program executes, and those that are vector FMLAs.
//
//   qemu-aarch64 -plugin ./count_instructions.so PROGRAM     prints on standard error at the end:
//   instructions N fmla N
//
// Debian ships no qemu-plugin.h; what is used of it is declared here after its documentation
// (https://www.qemu.org/docs/master/devel/tcg-plugins.html), interface version 1, qemu 6.0 to 8.2.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>

extern "C" {

struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info_t;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

void qemu_plugin_register_vcpu_tb_trans_cb(std::uint64_t id,
                                           void (*callback)(std::uint64_t id, qemu_plugin_tb* tb));
std::size_t qemu_plugin_tb_n_insns(const qemu_plugin_tb* tb);
qemu_plugin_insn* qemu_plugin_tb_get_insn(const qemu_plugin_tb* tb, std::size_t index);
const void* qemu_plugin_insn_data(const qemu_plugin_insn* insn);
void qemu_plugin_register_vcpu_insn_exec_inline(qemu_plugin_insn* insn, qemu_plugin_op op,
                                                void* counter, std::uint64_t addend);
void qemu_plugin_register_atexit_cb(std::uint64_t id, void (*callback)(std::uint64_t id, void*),
                                    void* data);

#define EXPORTED __attribute__((visibility("default")))
EXPORTED int qemu_plugin_version = 1;
EXPORTED int qemu_plugin_install(std::uint64_t id, const qemu_info_t* info, int argc, char** argv);
}

namespace {

// One program thread: qemu adds without a lock.
std::uint64_t instructions = 0;
std::uint64_t fmlas = 0;

// FMLA of float32 on all four lanes: by vector, or by element.
bool IsFmla(std::uint32_t word) {
  return (word & 0xffe0fc00u) == 0x4e20cc00u || (word & 0xffc0f400u) == 0x4f801000u;
}

void OnTranslation(std::uint64_t, qemu_plugin_tb* tb) {
  for (std::size_t i = 0; i < qemu_plugin_tb_n_insns(tb); ++i) {
    qemu_plugin_insn* const insn = qemu_plugin_tb_get_insn(tb, i);
    std::uint32_t word;
    std::memcpy(&word, qemu_plugin_insn_data(insn), sizeof(word));
    qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64, &instructions, 1);
    if (IsFmla(word)) {
      qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64, &fmlas, 1);
    }
  }
}

void AtExit(std::uint64_t, void*) {
  std::fprintf(stderr, "instructions %" PRIu64 " fmla %" PRIu64 "\n", instructions, fmlas);
}

}  // namespace

int qemu_plugin_install(std::uint64_t id, const qemu_info_t*, int, char**) {
  qemu_plugin_register_vcpu_tb_trans_cb(id, OnTranslation);
  qemu_plugin_register_atexit_cb(id, AtExit, nullptr);
  return 0;
}

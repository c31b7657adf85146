// Parts of an array in a file whose stream of bytes is cut into blocks that begin with a header (array_record).
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// A copy past the caches: the patch is next read by another thread, or by the device, after many others.
void Stream(char* out, const char* in, int64_t count) {
#ifdef __AVX512F__
  int64_t head = std::min<int64_t>(-reinterpret_cast<intptr_t>(out) & 63, count);
  std::memcpy(out, in, head);
  out += head, in += head, count -= head;
  for (; count >= 64; out += 64, in += 64, count -= 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
  }
#endif
  std::memcpy(out, in, count);
}

// A mapped page that cannot be read (the file was cut meanwhile, or the disk failed) raises SIGBUS where a read would
// return an error. Inside a copy it becomes that error; anywhere else it goes to whom it went before.
thread_local sigjmp_buf* volatile escape = nullptr;
struct sigaction other;

void OnBusError(int number, siginfo_t* info, void* context) {
  if (escape != nullptr) siglongjmp(*escape, 1);
  if (other.sa_flags & SA_SIGINFO) {
    other.sa_sigaction(number, info, context);
  } else if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) {
    other.sa_handler(number);
  } else {
    sigaction(number, &other, nullptr);  // the faulting instruction is repeated, and ends the process
  }
}

void Guard() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction mine = {};
    mine.sa_sigaction = OnBusError;
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGBUS, &mine, &other);
  });
}

struct Layout {
  int64_t block, header, payload;
  int64_t place(int64_t at) const { return at / payload * block + header + at % payload; }  // in the file
};

// Has the disk fetch what is not in memory of [first, last) of the file, many parts at a time: the copy, page by page,
// would wait for each.
void Fetch(int fd, int64_t first, int64_t last) {
  constexpr int64_t kProbe = 1 << 20, kRead = 1 << 17;  // of longer requests a kernel may read the beginning only
  char byte;
  iovec one = {&byte, 1};
  for (; first < last; first += kProbe) {
    int64_t end = std::min(first + kProbe, last);
    if (preadv2(fd, &one, 1, (first + end) / 2, RWF_NOWAIT) == 1) continue;
    for (int64_t at = first; at < end; at += kRead) readahead(fd, at, std::min(kRead, end - at));
  }
}

// Copies `count` bytes of the stream from place `first` on.
void Copy(const Layout& layout, const char* file, int64_t first, int64_t count, char* out) {
  while (count > 0) {
    int64_t here = std::min(layout.payload - first % layout.payload, count);
    Stream(out, file + layout.place(first), here);
    first += here, out += here, count -= here;
  }
}

}  // namespace

// Maps a file of `size` bytes into memory; null where that cannot be done.
extern "C" void* medjax_map(int fd, int64_t size) {
  void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  return data == MAP_FAILED ? nullptr : data;
}

// Takes the pages of a mapped file out of the process's memory; they come back when touched.
extern "C" void medjax_forget(void* data, int64_t size) { madvise(data, size, MADV_DONTNEED); }

extern "C" void medjax_unmap(void* data, int64_t size) { munmap(data, size); }

// Copies, for each of `outer` steps and in each of `inner` rows, `run` bytes of the stream to `out`, one after the
// other; `file` is the whole file of `size` bytes, mapped. Returns 0, -1 where it ends too soon, or errno.
extern "C" int medjax_gather(int fd, const char* file, int64_t size, int64_t block, int64_t header, int64_t first,
                             int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride, int64_t run,
                             char* out) {
  if (run == 0 || outer == 0 || inner == 0) return 0;
  const Layout layout{block, header, block - header};
  const bool sparse = inner_stride > 4 * run + 8192;  // what lies between the rows is not worth reading
  const int64_t reach = (inner - 1) * inner_stride + run;
  if (layout.place(first + (outer - 1) * outer_stride + reach - 1) >= size) return -1;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < (sparse ? inner : 1); ++j) {
      int64_t at = first + i * outer_stride + j * inner_stride;
      Fetch(fd, layout.place(at), layout.place(at + (sparse ? run : reach) - 1) + 1);
    }
  }
  Guard();
  sigjmp_buf here;
  if (sigsetjmp(here, 1)) {  // nothing between here and the copies has anything to undo
    escape = nullptr;
    return EIO;
  }
  escape = &here;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j, out += run) {
      Copy(layout, file, first + i * outer_stride + j * inner_stride, run, out);
    }
  }
  escape = nullptr;
#ifdef __AVX512F__
  _mm_sfence();
#endif
  return 0;
}

// This program runs the package that package.py makes, without Python, and compares the results
// with Python's.
//
//   python examples/aoti/package.py DIR
//   python -m mhc_ops build --arch sm_90a --hidden 256 -o KERNELS
//   TORCH=$(python -c 'import torch; print(torch.__path__[0])')
//   g++ -std=c++20 -O1 examples/aoti/main.cpp -o main \
//       -I$TORCH/include -I$TORCH/include/torch/csrc/api/include \
//       -L$TORCH/lib -Wl,-rpath,$TORCH/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
//   ./main KERNELS/host-torch2.14.so DIR
//
// With a CUDA build of torch add -ltorch_cuda -lc10_cuda. To replay the package in a CUDA graph,
// too, add -DWITH_CUDA -I$CUDA_HOME/include, and -lcudart from CUDA_HOME.

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <dlfcn.h>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#ifdef WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// Defines the ops of mhc_ops, with the kernels that lie beside the library. This has to happen
// before any package is loaded.
void serve(const char* path) {
  void* const library = dlopen(path, RTLD_NOW);
  if (library == nullptr) {
    throw std::runtime_error(dlerror());
  }
  using Serve = const char* (*)(const char*);
  const auto mhc_serve = reinterpret_cast<Serve>(dlsym(library, "mhc_serve"));
  if (mhc_serve == nullptr) {
    throw std::runtime_error(std::string(path) + " has no mhc_serve");
  }
  if (const char* const wrong = mhc_serve(nullptr)) {
    throw std::runtime_error(wrong);
  }
}

std::vector<at::Tensor> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : list.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  return tensors;
}

bool report(const char* how, const std::vector<at::Tensor>& outputs, const at::Tensor& hidden,
            const at::Tensor& streams) {
  const bool same = at::equal(outputs[0].cpu(), hidden) && at::equal(outputs[1].cpu(), streams);
  std::cout << how << ", hidden " << outputs[0].sizes() << ", streams " << outputs[1].sizes()
            << ", the bits of Python: " << (same ? "yes" : "no") << std::endl;
  return same;
}

bool run(const std::string& folder) {
  const std::vector<at::Tensor> expected = read(folder + "/expected.pt");
  // The last argument makes the loader single-threaded, so that a CUDA graph can capture a call.
  torch::inductor::AOTIModelPackageLoader loader(folder + "/stack.pt2", "model", true);
  const at::Device device(loader.get_metadata()["AOTI_DEVICE_KEY"]);
  bool same = true;
  for (size_t i = 0; i < expected.size(); i += 3) {
    const at::Tensor input = expected[i].to(device);
    same &= report("a call", loader.run({input}), expected[i + 1], expected[i + 2]);
#ifdef WITH_CUDA
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
    at::cuda::CUDAGraph graph;
    graph.capture_begin();
    const std::vector<at::Tensor> outputs = loader.run({input});
    graph.capture_end();
    graph.replay();
    c10::cuda::getCurrentCUDAStream().synchronize();
    same &= report("a CUDA graph", outputs, expected[i + 1], expected[i + 2]);
#endif
  }
  return same;
}

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: main KERNELS/host-torchVERSION.so DIR" << std::endl;
    return 2;
  }
  try {
    serve(arguments[1]);
    return run(arguments[2]) ? 0 : 1;
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << std::endl;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
  }
  return 2;
}

// Calls of leaf ops in a process of their own, for sanitizers, which take longer to start than to watch most calls.
//
// A call is three lines of stdin: the files for its input and its output, and its settings as "name value ...".  The files hold
// lines of text, each line about a tensor followed by its bytes (stable.py writes and reads them).  The call runs under the
// setting `schedules` of schedules from `schedule` on; they must agree bit for bit and leave the inputs as they were.  The
// answer is a line, how many regions really ran in parallel; an error ends the process.
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>

#include "stable_runtime.h"

namespace fastadapt {
__attribute__((weak)) bool set_target(const char* name);  // csrc/cpu/target.h, where the CPU sources are linked in
}

namespace {

struct Input {
  AtenTensorOpaque tensor;
  std::vector<char> bytes;
};

struct Call {
  std::string leaf;
  size_t outputs = 0;
  std::vector<std::string> kinds, lines;  // of the arguments
  std::vector<std::vector<char>> bytes;
};

Call read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  Call call;
  size_t count = 0;
  std::string line;
  std::getline(in, line);
  std::istringstream(line) >> call.leaf >> call.outputs >> count;
  for (size_t i = 0; i < count; i++) {
    std::getline(in, line);
    std::istringstream words(line);
    std::string kind, rest;
    int64_t bytes = 0;
    words >> kind >> bytes;
    std::getline(words, rest);
    call.kinds.push_back(kind);
    call.lines.push_back(rest);
    call.bytes.emplace_back(bytes);
    in.read(call.bytes.back().data(), bytes);
  }
  if (!in) throw std::runtime_error("the input ends too early");
  return call;
}

bool same(const void* a, const void* b, size_t bytes) { return bytes == 0 || std::memcmp(a, b, bytes) == 0; }

AtenTensorOpaque tensor(const std::string& line, const std::vector<char>& bytes) {
  AtenTensorOpaque t{};
  std::istringstream words(line);
  int64_t dims = 0, offset = 0;
  words >> t.dtype >> offset >> dims;
  t.sizes.resize(dims), t.strides.resize(dims);
  for (int64_t& size : t.sizes) words >> size;
  for (int64_t& stride : t.strides) words >> stride;
  if (!words || host::span(t) != static_cast<int64_t>(bytes.size())) throw std::runtime_error("a tensor of another size");
  t.memory = host::allocate(bytes.size(), offset, host::settings().alignment);
  t.data = t.memory.get();
  if (!bytes.empty()) std::memcpy(t.data, bytes.data(), bytes.size());
  return t;
}

StableIValue argument(
    const std::string& kind, const std::string& line, const std::vector<char>& bytes, std::vector<Input>& inputs) {
  if (kind.rfind("Optional[", 0) == 0) {
    if (line == " none") return host::pass_optional(nullptr);
    const StableIValue inner = argument(kind.substr(9, kind.size() - 10), line, bytes, inputs);
    return host::pass_optional(&inner);
  }
  std::istringstream words(line);
  if (kind == "Tensor") {
    inputs.push_back({tensor(line, bytes), bytes});
    return host::pass(inputs.back().tensor);
  }
  if (kind == "float") return host::pass(std::stod(line));
  int64_t number = 0;
  if (kind == "List[bool]") {
    std::vector<bool> all;
    while (words >> number) all.push_back(number);
    return host::pass(all);
  }
  words >> number;
  if (kind == "bool") return host::pass(number != 0);
  if (kind == "int") return host::pass(number);
  throw std::runtime_error("an argument of type " + kind);
}

std::vector<AtenTensorOpaque> run(const Call& call) {
  std::vector<Input> inputs;
  std::vector<StableIValue> stack;
  for (size_t i = 0; i < call.kinds.size(); i++) stack.push_back(argument(call.kinds[i], call.lines[i], call.bytes[i], inputs));
  std::vector<AtenTensorOpaque> outputs = host::call(call.leaf, std::move(stack), call.outputs);
  for (const Input& input : inputs)
    if (!same(input.tensor.data, input.bytes.data(), input.bytes.size()))
      throw std::runtime_error("an input was written to");
  return outputs;
}

void write(const std::string& path, const std::vector<AtenTensorOpaque>& outputs) {
  std::ofstream out(path, std::ios::binary);
  for (const AtenTensorOpaque& t : outputs) {
    out << t.dtype << ' ' << host::span(t) << ' ' << t.sizes.size();
    for (int64_t size : t.sizes) out << ' ' << size;
    for (int64_t stride : t.strides) out << ' ' << stride;
    out << '\n';
    out.write(static_cast<const char*>(t.data), host::span(t));
  }
}

void answer(const std::string& input, const std::string& output, std::istringstream settings) {
  host::Settings& s = host::settings() = host::Settings{};
  int64_t schedules = 1;
  for (std::string name, value; settings >> name >> value;) {
    if (name == "schedules") {
      schedules = std::stoll(value);
    } else if (name == "target") {
      if (!fastadapt::set_target || !fastadapt::set_target(value.c_str())) throw std::runtime_error("no target " + value);
    } else {
      s.set(name, std::stoll(value));
    }
  }
  host::parallel_regions() = 0;
  const Call call = read(input);
  const std::vector<AtenTensorOpaque> first = run(call);
  for (int64_t i = 1; i < schedules; i++) {
    s.schedule++;
    const std::vector<AtenTensorOpaque> other = run(call);
    for (size_t o = 0; o < first.size(); o++)
      if (host::span(first[o]) != host::span(other[o]) || !same(first[o].data, other[o].data, host::span(first[o])))
        throw std::runtime_error("schedule " + std::to_string(s.schedule) + " changes output " + std::to_string(o));
  }
  write(output, first);
  std::cout << host::parallel_regions() << std::endl;
}

}  // namespace

int main() {
  try {
    for (std::string input, output, settings; std::getline(std::cin, input);) {
      std::getline(std::cin, output), std::getline(std::cin, settings);
      answer(input, output, std::istringstream(settings));
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}

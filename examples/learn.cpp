// Learns a domain without Python: a training step that `model.export_training` wrote, in ONNX
// Runtime's C API. It knows no name of a tensor of the network: whatever comes out as `new.NAME`
// goes in as `NAME` of the next step.
//
//   g++ -std=c++17 learn.cpp -I<headers> -lonnxruntime -o learn
//   ./learn step.onnx images.bin targets.bin 20 0.01 0.5 learned.safetensors
//
// It takes the file, with the domain beside it; images as float32 and classes as int64, one sample
// behind the other; how many steps, the learning rate and the share of the hosts' work to execute.
// All samples are one batch. The file that it writes has no checksum of its content.
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

struct Array {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

static const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
static OrtAllocator* allocator = nullptr;

[[noreturn]] static void fail(const std::string& why) {
  std::fprintf(stderr, "learn: %s\n", why.c_str());
  std::exit(1);
}

static void check(OrtStatus* status) {
  if (status != nullptr) fail(api->GetErrorMessage(status));
}

static std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

static size_t size_of(const Array& array) {
  size_t size = array.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : 4;
  for (int64_t side : array.shape) size *= static_cast<size_t>(side);
  return size;
}

// Where a tensor lies in a safetensors file: behind its length and its JSON header; or nowhere, 0.
static size_t place_of(const std::vector<char>& file, const std::string& name) {
  uint64_t length = 0;
  if (file.size() < 8) fail("the domain's file is damaged");
  std::memcpy(&length, file.data(), 8);
  if (length > file.size() - 8) fail("the domain's file is damaged");
  const std::string header(file.data() + 8, length), key = "\"data_offsets\":[";
  const size_t entry = header.find("\"" + name + "\":{");
  if (entry == std::string::npos) return 0;
  return 8 + length + std::stoull(header.substr(header.find(key, entry) + key.size()));
}

static Array port_of(const OrtSession* session, size_t i, int64_t samples) {
  OrtTypeInfo* info = nullptr;
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  size_t axes = 0;
  Array found;
  check(api->SessionGetInputTypeInfo(session, i, &info));
  check(api->CastTypeInfoToTensorInfo(info, &tensor));
  check(api->GetTensorElementType(tensor, &found.type));
  check(api->GetDimensionsCount(tensor, &axes));
  found.shape.resize(axes);
  check(api->GetDimensions(tensor, found.shape.data(), axes));
  for (int64_t& side : found.shape) side = side < 0 ? samples : side;  // any number: the batch
  api->ReleaseTypeInfo(info);
  found.bytes.resize(size_of(found));
  return found;
}

int main(int count, char** words) {
  if (count != 8) fail("MODEL IMAGES TARGETS STEPS LEARNING_RATE GATE_TARGET LEARNED");
  if (api == nullptr) fail("this ONNX Runtime is older than the headers");
  const std::string path = words[1];
  const std::vector<char> images = read(words[2]), targets = read(words[3]);
  std::vector<char> domain = read(path + ".safetensors");
  const auto samples = static_cast<int64_t>(targets.size() / 8);

  OrtEnv* env = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  OrtMemoryInfo* memory = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "learn", &env));
  check(api->CreateSessionOptions(&options));
  check(api->CreateSession(env, path.c_str(), options, &session));
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));

  std::vector<char*> inputs, outputs;
  size_t taken = 0, given = 0;
  check(api->SessionGetInputCount(session, &taken));
  check(api->SessionGetOutputCount(session, &given));
  inputs.resize(taken), outputs.resize(given);
  for (size_t i = 0; i < given; ++i)
    check(api->SessionGetOutputName(session, i, allocator, &outputs[i]));

  std::map<std::string, Array> arrays;  // moments begin with zeros, as all arrays here do
  for (size_t i = 0; i < taken; ++i) {
    check(api->SessionGetInputName(session, i, allocator, &inputs[i]));
    Array& array = arrays[inputs[i]] = port_of(session, i, samples);
    if (size_t place = place_of(domain, inputs[i])) {
      if (place + array.bytes.size() > domain.size()) fail("the domain's file is damaged");
      std::memcpy(array.bytes.data(), domain.data() + place, array.bytes.size());
    }
  }
  const auto say = [&](const std::string& name, float value) {
    if (arrays.count(name)) std::memcpy(arrays[name].bytes.data(), &value, sizeof value);
  };
  if (arrays["input"].bytes.size() != images.size() || samples == 0) fail("images do not fit");
  arrays["input"].bytes = images, arrays["targets"].bytes = targets;
  say("learning_rate", std::stof(words[5])), say("gate_target", std::stof(words[6]));
  say("weight", 1), say("apply", 1);

  for (int step = 1; step <= std::stoi(words[4]); ++step) {
    say("step", static_cast<float>(step));
    std::vector<OrtValue*> fed(taken, nullptr), found(given, nullptr);
    for (size_t i = 0; i < taken; ++i) {
      Array& array = arrays[inputs[i]];
      check(api->CreateTensorWithDataAsOrtValue(memory, array.bytes.data(), array.bytes.size(),
                                                array.shape.data(), array.shape.size(), array.type,
                                                &fed[i]));
    }
    check(api->Run(session, nullptr, inputs.data(), fed.data(), taken, outputs.data(), given,
                   found.data()));
    for (size_t i = 0; i < given; ++i) {
      void* data = nullptr;
      const std::string name = outputs[i];
      check(api->GetTensorMutableData(found[i], &data));
      if (name == "loss") std::printf("%.6f\n", static_cast<double>(*static_cast<float*>(data)));
      if (name.rfind("new.", 0) != 0) continue;
      Array& array = arrays[name.substr(4)];
      std::memcpy(array.bytes.data(), data, array.bytes.size());
    }
    for (OrtValue* value : fed) api->ReleaseValue(value);
    for (OrtValue* value : found) api->ReleaseValue(value);
  }

  for (const auto& [name, array] : arrays)
    if (size_t place = place_of(domain, name))
      std::memcpy(domain.data() + place, array.bytes.data(), array.bytes.size());
  std::ofstream file(words[7], std::ios::binary);
  if (!file.write(domain.data(), static_cast<std::streamsize>(domain.size())))
    fail(std::string("cannot write ") + words[7]);
}

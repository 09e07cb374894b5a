# tw_fuzzer(NAME SOURCE...): a libFuzzer program in <build>/fuzzers; its corpus is in git as
# tests/fuzz/corpus/NAME. Preset "fuzz" only.
function(tw_fuzzer name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE thinwire tw_flags)
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fuzzers)
endfunction()

# tw_test(NAME SOURCE... [LINK target...]): a GoogleTest program in <build>/tests, each of its cases a
# test of ctest.
find_package(GTest REQUIRED)
include(GoogleTest)

# For programs under mpirun, run as root too. LeakSanitizer stays off there: Open MPI keeps memory
# until the process ends, in modules that are unloaded by then and cannot be named to it.
set(TW_MPI_TEST_ENVIRONMENT
    "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;LSAN_OPTIONS=detect_leaks=0")

function(tw_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "LINK")
  add_executable(${name} ${arg_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE thinwire tw_flags ${arg_LINK} GTest::gmock GTest::gtest_main)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 DISCOVERY_MODE PRE_TEST)
endfunction()

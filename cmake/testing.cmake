# tw_test(NAME SOURCE... [LINK target...] [SHARDS n]): a GoogleTest program in <build>/tests.
# tw_add_cases(NAME [n]) makes each case of a program a test of ctest, or deals them out to n tests.
find_package(GTest REQUIRED)
include(GoogleTest)

# A sanitizer's start takes longer than most cases do, so there many share a process.
set(TW_TEST_SHARDS 0 CACHE STRING
    "0: each case is a test of ctest; N: the cases of a program are dealt out to N of them")
# Preset asan leaves out, of test programs only, those checks of UBSan that double their compile time
# and say little that ASan does not.
set(TW_TEST_CXX_FLAGS "" CACHE STRING "Further compiler options of the test programs' sources")
mark_as_advanced(TW_TEST_SHARDS TW_TEST_CXX_FLAGS)

# For programs under mpirun, run as root too. LeakSanitizer stays off there: Open MPI keeps memory
# until the process ends, in modules that are unloaded by then and cannot be named to it.
set(TW_MPI_TEST_ENVIRONMENT
    "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;LSAN_OPTIONS=detect_leaks=0")

# What programs keep in the user's cache is kept in the build tree.
set(TW_TEST_ENVIRONMENT "XDG_CACHE_HOME=${CMAKE_BINARY_DIR}/cache")

function(tw_add_cases name)
  set(shards ${TW_TEST_SHARDS})
  if(ARGN)
    set(shards ${ARGN})
  endif()
  if(NOT shards)
    gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 DISCOVERY_MODE PRE_TEST
                         PROPERTIES ENVIRONMENT "${TW_TEST_ENVIRONMENT}")
    return()
  endif()
  foreach(shard RANGE 1 ${shards})
    math(EXPR index "${shard} - 1")
    add_test(NAME ${name}_${shard}_of_${shards} COMMAND ${name})
    set_tests_properties(${name}_${shard}_of_${shards} PROPERTIES
      ENVIRONMENT
        "${TW_TEST_ENVIRONMENT};GTEST_TOTAL_SHARDS=${shards};GTEST_SHARD_INDEX=${index}")
  endforeach()
endfunction()

function(tw_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "SHARDS" "LINK")
  add_executable(${name} ${arg_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE thinwire tw_flags ${arg_LINK} GTest::gmock GTest::gtest_main)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  tw_add_cases(${name} ${arg_SHARDS})
endfunction()

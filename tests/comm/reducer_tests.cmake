# The tests of policy, costs, handshake and reducer.
tw_test(comm_policy_test policy_test.cpp)
tw_test(comm_collective_cost_test collective_cost_test.cpp)

add_library(comm_reducer_fixture OBJECT reducer_fixture.cpp)
target_link_libraries(comm_reducer_fixture PUBLIC tw_flags)
target_include_directories(comm_reducer_fixture SYSTEM PUBLIC ${XXHASH_INCLUDE_DIR})
foreach(test handshake_test reducer_test reducer_state_test reducer_failure_test reshard_test
             gradient_method_test link_model_test reducer_auto_test reducer_policy_test trace_test)
  tw_test(comm_${test} ${test}.cpp LINK comm_reducer_fixture)
endforeach()
target_include_directories(comm_trace_test SYSTEM PRIVATE ${NLOHMANN_JSON_INCLUDE_DIR})

if(TARGET thinwire_mpi)
  add_executable(mpi_failing_job mpi_failing_job.cpp)
  target_link_libraries(mpi_failing_job PRIVATE
    thinwire thinwire_mpi tw_flags comm_reducer_fixture)
  set_target_properties(mpi_failing_job PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  tw_test(comm_mpi_failure_test mpi_failure_test.cpp)
  add_dependencies(comm_mpi_failure_test mpi_failing_job)
  target_compile_definitions(comm_mpi_failure_test PRIVATE
    TW_MPIEXEC="${MPIEXEC_EXECUTABLE}" TW_FAILING_JOB="$<TARGET_FILE:mpi_failing_job>")
endif()

# The transports of comm/: targets tw_mpi and tw_gloo carry what their code needs.

if(NOT DEFINED TW_WITH_MPI OR TW_WITH_MPI)
  set(MPI_CXX_SKIP_MPICXX ON)  # the C interface only
  find_package(MPI QUIET COMPONENTS CXX)
endif()
if(MPI_CXX_FOUND)
  get_filename_component(found_in "${MPI_CXX_COMPILER}" DIRECTORY)
  set(tw_mpi_found "MPI ${MPI_CXX_VERSION} interface (${found_in})")
endif()
tw_decide(MPI FOUND ${MPI_CXX_FOUND} YES "${tw_mpi_found}"
          NO "no MPI compiler wrapper found (Debian: libopenmpi-dev openmpi-bin)")
if(TW_HAVE_MPI)
  add_library(tw_mpi INTERFACE)
  target_link_libraries(tw_mpi INTERFACE MPI::MPI_CXX)
endif()

find_path(TW_GLOO_INCLUDE_DIR gloo/allreduce.h)
find_library(TW_GLOO_LIBRARY gloo)
mark_as_advanced(TW_GLOO_INCLUDE_DIR TW_GLOO_LIBRARY)
set(tw_gloo_found FALSE)
if(TW_GLOO_INCLUDE_DIR AND TW_GLOO_LIBRARY)
  set(tw_gloo_found TRUE)
endif()
tw_decide(GLOO FOUND ${tw_gloo_found} YES "${TW_GLOO_LIBRARY}"
          NO "gloo/allreduce.h or libgloo not found (Debian: libgloo-dev)")
if(TW_HAVE_GLOO)
  add_library(tw_gloo INTERFACE)
  target_include_directories(tw_gloo SYSTEM INTERFACE ${TW_GLOO_INCLUDE_DIR})
  target_link_libraries(tw_gloo INTERFACE ${TW_GLOO_LIBRARY} Threads::Threads)
endif()

# A simulated network for cluster/scale: SimGrid's own mpi.h and library.
find_path(TW_SMPI_INCLUDE_DIR smpi/mpi.h)
find_library(TW_SIMGRID_LIBRARY simgrid)
mark_as_advanced(TW_SMPI_INCLUDE_DIR TW_SIMGRID_LIBRARY)
set(tw_smpi_found FALSE)
if(TW_SMPI_INCLUDE_DIR AND TW_SIMGRID_LIBRARY)
  set(tw_smpi_found TRUE)
endif()
tw_decide(SMPI FOUND ${tw_smpi_found} YES "${TW_SIMGRID_LIBRARY}, for cluster/scale"
          NO "smpi/mpi.h or libsimgrid not found (Debian: libsimgrid-dev)")
if(TW_HAVE_SMPI)
  add_library(tw_smpi INTERFACE)
  target_include_directories(tw_smpi SYSTEM INTERFACE ${TW_SMPI_INCLUDE_DIR}/smpi)
  target_link_libraries(tw_smpi INTERFACE ${TW_SIMGRID_LIBRARY})
endif()

# The Python side. Decides PYTHON (extension module _codec) and TORCH (_torch), offers
#   tw_nanobind_module(NAME SOURCE...)   needs no torch
#   tw_torch_module(NAME SOURCE...)      against the torch of ${Python_EXECUTABLE}; pybind11 comes with it
# Both link libthinwire, land in <build>/python/thinwire/ and are installed into the package.

# Without a wish of the user's: the project's own environment, then python3 of PATH.
if(NOT Python_EXECUTABLE AND EXISTS ${PROJECT_SOURCE_DIR}/.venv/bin/python)
  set(Python_EXECUTABLE ${PROJECT_SOURCE_DIR}/.venv/bin/python CACHE FILEPATH "Python to build for")
endif()
find_package(Python 3.11 QUIET COMPONENTS Interpreter Development.Module)

# tw_ask_python(OUT SCRIPT): what the script prints, or "" when it fails. -E: pip's isolated builds
# hide the target's own packages (torch) behind PYTHON* variables.
function(tw_ask_python out script)
  execute_process(COMMAND ${Python_EXECUTABLE} ${ARGN} -c "${script}"
                  OUTPUT_VARIABLE text ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE
                  WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

set(tw_python_found FALSE)
set(tw_python_lacks "no Python 3.11 or newer with headers found (Debian: python3-dev)")
if(Python_FOUND)
  tw_ask_python(nanobind_ROOT "import nanobind; print(nanobind.cmake_dir())")
  set(tw_python_lacks "no nanobind in ${Python_EXECUTABLE} (pip install nanobind)")
  if(nanobind_ROOT)
    find_package(nanobind CONFIG REQUIRED)
    set(tw_python_found TRUE)
  endif()
endif()
tw_decide(PYTHON FOUND ${tw_python_found} YES "${Python_VERSION}, nanobind (${Python_EXECUTABLE})"
          NO "${tw_python_lacks}")

set(tw_torch_found FALSE)
set(tw_torch_lacks "needs TW_WITH_PYTHON")
if(TW_HAVE_PYTHON AND (NOT DEFINED TW_WITH_TORCH OR TW_WITH_TORCH))
  set(tw_torch_lacks "no torch in ${Python_EXECUTABLE}")
  tw_ask_python(tw_torch "
import torch
from torch.utils.cpp_extension import include_paths, library_paths
print(torch.__version__, int(torch._C._GLIBCXX_USE_CXX11_ABI),
      int(torch.distributed.is_available()), '|'.join(include_paths()), '|'.join(library_paths()),
      sep='\\n')" -E)
  if(tw_torch)
    string(REPLACE "\n" ";" tw_torch "${tw_torch}")
    list(GET tw_torch 0 tw_torch_version)
    list(GET tw_torch 1 tw_torch_abi)
    list(GET tw_torch 2 tw_torch_distributed)
    list(GET tw_torch 3 tw_torch_includes)
    list(GET tw_torch 4 tw_torch_folders)
    string(REPLACE "|" ";" tw_torch_includes "${tw_torch_includes}")
    string(REPLACE "|" ";" tw_torch_folders "${tw_torch_folders}")
    if(NOT tw_torch_abi)
      set(tw_torch_lacks "torch ${tw_torch_version} was built with the old C++ string ABI")
    elseif(NOT tw_torch_distributed)
      set(tw_torch_lacks "torch ${tw_torch_version} was built without torch.distributed")
    else()
      set(tw_torch_found TRUE)
    endif()
  endif()
endif()
tw_decide(TORCH FOUND ${tw_torch_found} YES "${tw_torch_version}" NO "${tw_torch_lacks}")
if(TW_HAVE_TORCH)
  add_library(tw_torch INTERFACE)
  target_include_directories(tw_torch SYSTEM INTERFACE ${tw_torch_includes})
  # Linked by name: in a Python process they are there already, brought by `import torch`.
  foreach(name torch torch_cpu torch_python c10)
    find_library(TW_TORCH_LIBRARY_${name} ${name} PATHS ${tw_torch_folders} NO_DEFAULT_PATH NO_CACHE
                 REQUIRED)
  endforeach()
  target_link_libraries(tw_torch INTERFACE
    ${TW_TORCH_LIBRARY_torch} ${TW_TORCH_LIBRARY_torch_cpu} ${TW_TORCH_LIBRARY_c10})
  target_compile_definitions(tw_torch INTERFACE TORCH_API_INCLUDE_EXTENSION_H USE_C10D_GLOO)
  target_compile_features(tw_torch INTERFACE cxx_std_20)
  # Debug information of all that torch's headers define would take half of the compile time.
  target_compile_options(tw_torch INTERFACE $<$<CONFIG:RelWithDebInfo>:-g1>)
endif()

set(TW_PYTHON_MODULES "" CACHE INTERNAL "")

function(tw_package_module name)
  target_link_libraries(${name} PRIVATE tw_flags thinwire)
  set_target_properties(${name} PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/python/thinwire
    INSTALL_RPATH "$ORIGIN/lib")
  install(TARGETS ${name} LIBRARY DESTINATION thinwire COMPONENT python)
  set(TW_PYTHON_MODULES ${TW_PYTHON_MODULES} ${name} CACHE INTERNAL "")
endfunction()

function(tw_nanobind_module name)
  nanobind_add_module(${name} NB_STATIC NB_SUPPRESS_WARNINGS ${ARGN})
  tw_package_module(${name})
endfunction()

function(tw_torch_module name)
  Python_add_library(${name} MODULE WITH_SOABI ${ARGN})
  target_compile_definitions(${name} PRIVATE TORCH_EXTENSION_NAME=${name})
  target_link_libraries(${name} PRIVATE tw_torch ${TW_TORCH_LIBRARY_torch_python})
  tw_package_module(${name})
endfunction()

# After all modules: target tw_package is what a wheel holds. With TW_INPLACE the modules are also
# linked into the source tree, beside the Python files: the tree built last is the one in use. That
# is always run, for another build tree may have linked its own in between.
function(tw_finish_package)
  add_custom_target(tw_package DEPENDS thinwire ${TW_PYTHON_MODULES})
  set(package ${PROJECT_SOURCE_DIR}/integrations/torch/thinwire)
  if(NOT TW_INPLACE OR NOT TW_PYTHON_MODULES OR NOT EXISTS ${package})
    return()
  endif()
  set(commands "")
  foreach(name IN LISTS TW_PYTHON_MODULES)
    list(APPEND commands COMMAND ${CMAKE_COMMAND} -E create_symlink $<TARGET_FILE:${name}>
         ${package}/$<TARGET_FILE_NAME:${name}>)
  endforeach()
  add_custom_target(tw_inplace ALL ${commands} COMMENT "" VERBATIM)
  add_dependencies(tw_inplace ${TW_PYTHON_MODULES})
endfunction()

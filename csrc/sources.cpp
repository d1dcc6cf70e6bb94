// What the library was built from, for scripts that find it beside other sources: scripts/built_from.py reads the text
// from the file, without loading it. CMakeLists.txt makes the hash.
extern "C" __attribute__((used, visibility("default"))) const char ijckd_sources[] = "ijckd sources " IJCKD_SOURCES;

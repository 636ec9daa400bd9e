// Package enginetest is a stand-in for Dagger engines in tests: a program that
// keeps and loses its cache as Dagger engine v0.21.8 does, run as a real process
// that can be signalled and killed. It owns that program and its data folder. It
// never runs a pipeline: a job is a number of bytes that are there afterwards.
//
// What it does like the real one:
//
//   - From its start until a stop has been completed its data are marked unclean.
//     One that starts on unclean data erases the whole cache, and no metric says so.
//   - SIGTERM refuses new clients, cancels the sessions, so that
//     dagger_connected_clients reads 0, and waits without end until the clients
//     themselves have left. Only then are the data marked clean and the exit code
//     is 0. A kill before that is an unclean stop.
//   - The bytes of the cache are counted at the start and then from time to time;
//     until the first count they read 0. Sessions are counted when asked for.
//   - One engine per data folder: a second one exits with 1.
//
// A test binary becomes the engine by calling [Main] first in its TestMain; tests
// then call [Start].
package enginetest

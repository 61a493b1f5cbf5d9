/// One operation of the tracker, as one Lua script: so it happens as a whole, or not at all.
///
/// All scripts take the same keys, the family of one project and the index of pending finishes, and answer with the
/// verdict and the progress after it. Everything is read and checked before the first write, since scripts have no
/// rollback. They begin with `#!lua`, so that they are refused as a whole when memory is out (Redis 7).
package struct TrackerScript: Sendable {
    package let name: String
    let lua: RedisScript
    package var source: String { lua.text }

    /// - Parameter flags: `no-writes` for what only reads, `allow-oom` for what gives memory back.
    init(_ name: String, flags: String = "", _ body: String) {
        self.name = name
        lua = RedisScript("#!lua\(flags.isEmpty ? "" : " flags=\(flags)")\n" + Self.prelude + body)
    }

    /// What every script needs: the fields of the hash, checked, and the answer.
    ///
    /// KEYS: hash, items that succeeded, items that failed, batches, pending finishes, index of projects with such, and the
    /// two kinds of items of the second stage. ARGV: time to live, layout of a hash that does not tell its own.
    private static let prelude = """
        local main, batches, pending, index = KEYS[1], KEYS[4], KEYS[5], KEYS[6]

        local h = redis.call('HMGET', main, 'status', 'total', 'done', 'errors', '_layout', '_sealed', '_finished',
            '_finish_id', '_kind', '_started_ms', '_gen', '_reason', '_cancelled', '_items', '_failed', 'crawl_total',
            '_batches')
        local status, finished, finish_id, kind = h[1], h[7] == '1', h[8], h[9]
        -- What a sibling calls this is sealed too.
        local sealed = h[6] == '1' or status == 'PROCESSING_WAIT'

        -- Given up by us: a sibling may have written another status since.
        local abandoned = h[13]

        -- Siblings leave out counters that are zero; anything but digits is junk, and so is what HINCRBY refuses.
        local function number(text)
          if not text then return 0 end
          if #text > 15 or (text ~= '0' and not string.match(text, '^[1-9]%d*$')) then return nil end
          return tonumber(text)
        end
        local function whole(n) return string.format('%.0f', n) end

        -- The stages: `remembered` items, `lapsed` ones of these remembered as failed.
        local layout, stages = h[5] or (h[16] and 'stages') or ARGV[2], nil
        if layout == 'stages' then
          local m = redis.call('HMGET', main, 'crawl_done', 'crawl_errors', 'analyze_total', 'analyze_done',
            'analyze_errors', '_items2', '_failed2')
          stages = {
            {prefix = 'crawl_', suffix = '', ok = KEYS[2], err = KEYS[3], total = number(h[16]), done = number(m[1]),
              errors = number(m[2]), remembered = number(h[14]), lapsed = number(h[15])},
            {prefix = 'analyze_', suffix = '2', ok = KEYS[7], err = KEYS[8], total = number(m[3]),
              done = number(m[4]), errors = number(m[5]), remembered = number(m[6]), lapsed = number(m[7])}}
        else
          stages = {{prefix = '', suffix = '', ok = KEYS[2], err = KEYS[3], total = number(h[2]), done = number(h[3]),
            errors = number(h[4]), remembered = number(h[14]), lapsed = number(h[15])}}
        end
        local first, apart, generation = stages[1], layout ~= 'flat', number(h[11] or '1')
        local missing = not status and not h[2] and not h[3] and not h[4] and not h[16]
        local corrupt = not missing and (not status or not generation
          or (layout ~= 'flat' and layout ~= 'apart' and layout ~= 'stages'))
        for _, s in ipairs(stages) do
          corrupt = corrupt or not (s.total and s.done and s.errors and s.remembered and s.lapsed)
        end

        -- What is remembered must be there: `ok` for a success, `err` for a failure.
        local function is_lost(s)
          return (s.remembered > s.lapsed and redis.call('EXISTS', s.ok) == 0)
            or (s.lapsed > 0 and redis.call('EXISTS', s.err) == 0)
        end

        local function settled(s) return apart and s.done + s.errors or s.done end

        local function percent()
          local sum = 0
          for _, s in ipairs(stages) do
            if s.total > 0 then sum = sum + math.min(1, settled(s) / s.total) end
          end
          return math.floor(sum * 100 / #stages)
        end
        local known = not missing and not corrupt
        local old_status, old_percent = status, known and percent()

        -- Watchers are told of a new status and of each percent. A user without the permission to tell them is no
        -- reason to leave a script half done.
        local function reply(verdict, items)
          if known and (status ~= old_status or percent() ~= old_percent) then
            redis.pcall('PUBLISH', '{' .. main .. '}:progress', status)
          end
          local shown = finished and 'DONE' or abandoned and 'FAILED' or status or ''
          local answer = {verdict, items or '', shown, layout, sealed and 1 or 0, generation or 0,
            finished and finish_id or '', abandoned == '1' and 1 or 0, h[12] or ''}
          for _, s in ipairs(stages) do
            answer[#answer + 1] = s.total or 0
            answer[#answer + 1] = s.done and s.errors and settled(s) or 0
            answer[#answer + 1] = s.errors or 0
          end
          return answer
        end

        -- Every update keeps the family for another while; a pending finish keeps it until it is published.
        local function touch(ttl)
          if (finished or generation > 1) and redis.call('EXISTS', pending) == 1 then return end
          redis.call('EXPIRE', main, ttl)
          redis.call('EXPIRE', batches, ttl)
          for _, s in ipairs(stages) do
            redis.call('EXPIRE', s.ok, ttl)
            redis.call('EXPIRE', s.err, ttl)
          end
        end

        local function is_pending() return finish_id and redis.call('HEXISTS', pending, finish_id) == 1 end
        local function over() return is_pending() and 'finishPending' or 'alreadyFinished' end

        -- A sibling that has set DONE has finished the project in its own way: there is no second finish.
        local function may_finish()
          if not sealed or finished or abandoned or status == 'DONE' or status == 'FAILED' then return false end
          for _, s in ipairs(stages) do
            if settled(s) < s.total then return false end
          end
          return true
        end

        -- Fails on keys of another type before anything is written.
        local function check_finish_keys(project)
          redis.call('HLEN', pending)
          redis.call('SISMEMBER', index, project)
        end

        local function now_ms()
          local time = redis.call('TIME')
          return time[1] * 1000 + math.floor(time[2] / 1000)
        end

        local function finish(project, candidate, items)
          local now = now_ms()
          local seconds = (now - (tonumber(h[10] or '') or now)) / 1000
          local total, done, errors = 0, 0, 0
          for _, s in ipairs(stages) do
            total, done, errors = total + s.total, done + settled(s), errors + s.errors
          end
          finished, status, finish_id = true, 'DONE', finish_id or candidate
          redis.call('HSET', main, 'status', 'DONE', '_finished', '1', '_sealed', '1', '_finish_id', finish_id)
          redis.call('HSET', pending, finish_id, whole(generation) .. ' ' .. whole(now) .. ' ' .. string.format(
              '{"total":%.0f,"done":%.0f,"errors":%.0f,"duration_seconds":%.3f}', total, done, errors, seconds))
          redis.call('SADD', index, project)
          for _, key in ipairs(KEYS) do
            if key ~= index then redis.call('PERSIST', key) end
          end
          return reply('finished', items)
        end


        """

    /// ARGV: time to live, layout, finish event id.
    static let start = TrackerScript(
        "start",
        """
        if corrupt then return reply('corrupt') end
        if not missing then return reply('exists') end
        -- What an earlier life of this project has left behind must not count in this one.
        redis.call('DEL', KEYS[2], KEYS[3], batches, KEYS[7], KEYS[8])
        status = 'INITIALIZING'
        redis.call('HSET', main, 'status', status, '_layout', layout, '_gen', '1', '_finish_id', ARGV[3],
          '_started_ms', whole(now_ms()))
        for _, s in ipairs(stages) do
          redis.call('HSET', main, s.prefix .. 'total', '0', s.prefix .. 'done', '0', s.prefix .. 'errors', '0')
        end
        redis.call('EXPIRE', main, ARGV[1])
        return reply('started')
        """)

    /// ARGV: time to live, layout, finish event id, the generation before.
    static let restart = TrackerScript(
        "restart",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        local from = tonumber(ARGV[4])
        if generation == from + 1 then return reply('exists') end
        if generation ~= from then return reply(generation > from and 'stale' or 'unknownProject') end
        if not finished and not abandoned and status ~= 'DONE' and status ~= 'FAILED' then
          return reply('notFinished')
        end
        redis.call('HLEN', pending)
        redis.call('DEL', KEYS[2], KEYS[3], batches, KEYS[7], KEYS[8])
        redis.call('HDEL', main, '_sealed', '_finished', '_kind', '_items', '_failed', '_items2', '_failed2',
          '_reason', '_cancelled', '_batches')
        generation, status, sealed, finished, finish_id = generation + 1, 'INITIALIZING', false, false, ARGV[3]
        h[12], abandoned = false, false
        redis.call('HSET', main, 'status', status, '_layout', layout, '_gen', whole(generation), '_finish_id', finish_id,
          '_started_ms', whole(now_ms()))
        for _, s in ipairs(stages) do
          s.total, s.done, s.errors = 0, 0, 0
          redis.call('HSET', main, s.prefix .. 'total', '0', s.prefix .. 'done', '0', s.prefix .. 'errors', '0')
        end
        touch(ARGV[1])
        return reply('restarted')
        """)

    /// ARGV: time to live, layout, count, batch.
    static let expect = TrackerScript(
        "expect",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        if redis.call('SISMEMBER', batches, ARGV[4]) == 1 then return reply('duplicate') end
        if finished or abandoned or status == 'DONE' or status == 'FAILED' then return reply('alreadyFinished') end
        if sealed then return reply('alreadySealed') end
        if h[17] and redis.call('EXISTS', batches) == 0 then return reply('memoryLost') end
        local sum = first.total + tonumber(ARGV[3])
        if sum > 999999999999999 then return redis.error_reply('ERR the total has more than 15 digits') end
        first.total = sum
        redis.call('SADD', batches, ARGV[4])
        redis.call('HSET', main, first.prefix .. 'total', whole(sum), '_batches', '1')
        if status == 'INITIALIZING' then
          status = layout == 'stages' and 'PROCESSING' or 'CRAWLING'
          redis.call('HSET', main, 'status', status)
        end
        touch(ARGV[1])
        return reply('expected')
        """)

    /// ARGV: time to live, layout, finish event id, project, total or nothing.
    static let seal = TrackerScript(
        "seal",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        local final = ARGV[5] == '' and first.total or tonumber(ARGV[5])
        if finished then
          if final ~= first.total then return reply('alreadyFinished') end
          return reply(is_pending() and 'finishPending' or 'duplicate')
        end
        if abandoned or status == 'DONE' or status == 'FAILED' then return reply('alreadyFinished') end
        if final < settled(first) then return reply('totalBelowDone') end
        check_finish_keys(ARGV[4])
        first.total, sealed, status = final, true, 'PROCESSING'
        redis.call('HSET', main, first.prefix .. 'total', whole(final), '_sealed', '1', 'status', status)
        if may_finish() then return finish(ARGV[4], ARGV[3]) end
        touch(ARGV[1])
        return reply('sealed')
        """)

    /// ARGV: time to live, layout, finish event id, project, generation or nothing, stage or nothing, kind (`i` or `n`),
    /// then the items, each after its outcome (`s` or `f`).
    package static let advance = TrackerScript(
        "advance",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        local asked = tonumber(ARGV[5])
        -- A later generation than there is: the report has overtaken the restart.
        if asked and asked ~= generation then return reply(asked < generation and 'stale' or 'unknownProject') end
        local is_second = ARGV[6] == 'analyze'
        if ARGV[6] ~= '' and layout ~= 'stages' then return reply('stageMismatch') end
        local s, is_index = stages[is_second and 2 or 1], ARGV[7] == 'i'
        if kind and kind ~= ARGV[7] then return reply('itemKindMismatch') end

        local get, lost = is_index and 'GETBIT' or 'SISMEMBER', is_lost(s)
        if sealed and settled(s) + #ARGV - 7 >= s.total then check_finish_keys(ARGV[4]) end

        local function remember(key, item, flag)
          if is_index then
            redis.call('SETBIT', key, item, flag and 1 or 0)
          else
            redis.call(flag and 'SADD' or 'SREM', key, item)
          end
        end
        local function has_room(item)
          if not sealed then return true end
          local limit = s.total
          -- What is being crawled still adds to what is to be analysed, and may be analysed before that is known.
          if is_second and settled(first) < first.total then limit = first.total end
          return settled(s) < limit and (not is_index or tonumber(item) < first.total)
        end

        local moved = {}
        local function move(field, n) moved[field] = (moved[field] or 0) + n end
        local function count(n) s.done = s.done + n; move(s.prefix .. 'done', n) end
        local function fail(n) s.errors = s.errors + n; move(s.prefix .. 'errors', n) end
        local function succeed()
          count(1)
          if layout == 'stages' and not is_second and not finished then
            stages[2].total = stages[2].total + 1
            move('analyze_total', 1)
          end
        end
        local verdicts, last = {}, nil
        for i = 8, #ARGV do
          local failed, item = string.sub(ARGV[i], 1, 1) == 'f', string.sub(ARGV[i], 2)
          local was_ok, was_err = redis.call(get, s.ok, item) == 1, redis.call(get, s.err, item) == 1
          local verdict
          if lost and not was_ok and not (was_err and failed) then
            verdict = 'memoryLost'
          elseif was_err and not was_ok and not failed then
            remember(s.ok, item, true)
            remember(s.err, item, false)
            move('_failed' .. s.suffix, -1)
            -- Not where a sibling has taken the error back already.
            if s.errors > 0 then
              fail(-1)
              if apart then succeed() end
            end
            verdict = 'reclassified'
          elseif was_ok or was_err then
            verdict = finished and over() or 'duplicate'
          elseif not has_room(item) then
            verdict = 'unexpectedItem'
          else
            remember(failed and s.err or s.ok, item, true)
            move('_items' .. s.suffix, 1)
            if failed then
              move('_failed' .. s.suffix, 1)
              fail(1)
              if not apart then count(1) end
            else
              succeed()
            end
            verdict, last = 'counted', #verdicts + 1
          end
          verdicts[#verdicts + 1] = verdict
        end

        if next(moved) then
          for field, n in pairs(moved) do
            if n ~= 0 then redis.call('HINCRBY', main, field, n) end
          end
          if last and not kind then redis.call('HSET', main, '_kind', ARGV[7]) end
          if last and may_finish() then
            verdicts[last] = 'finished'
            return finish(ARGV[4], ARGV[3], table.concat(verdicts, ','))
          end
          touch(ARGV[1])
        end
        return reply(verdicts[#verdicts], table.concat(verdicts, ','))
        """)

    /// ARGV: time to live, layout, `failed` or `cancelled`, reason.
    static let abandon = TrackerScript(
        "abandon",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        if finished or status == 'DONE' then return reply('alreadyFinished') end
        local is_cancel = ARGV[3] == 'cancelled'
        if abandoned or status == 'FAILED' then
          return reply((abandoned == '1') == is_cancel and ARGV[3] or 'alreadyFinished')
        end
        status, h[12], abandoned = 'FAILED', ARGV[4], is_cancel and '1' or '0'
        redis.call('HSET', main, 'status', status, '_reason', ARGV[4], '_cancelled', abandoned)
        -- A sibling's seal was in the status.
        if sealed then redis.call('HSET', main, '_sealed', '1') end
        touch(ARGV[1])
        return reply(ARGV[3])
        """)

    /// ARGV: time to live, layout, finish event id, project.
    static let settle = TrackerScript(
        "settle",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        if may_finish() then
          check_finish_keys(ARGV[4])
          return finish(ARGV[4], ARGV[3])
        end
        return reply(finished and over() or 'unchanged')
        """)

    /// ARGV: time to live, layout, finish event id, project, anything for a dry run. Answers with what was found, what of it
    /// is mended, the seconds that the hash has left, and as the others do.
    static let inspect = TrackerScript(
        "inspect",
        """
        local is_dry, found, mended = ARGV[5] ~= '', {}, {}
        local function find(name, mend)
          found[#found + 1] = name
          if mend then
            mended[#mended + 1] = name
            if not is_dry then mend() end
          end
        end
        local function answer(verdict)
          return {table.concat(found, ','), table.concat(mended, ','), redis.call('TTL', main), reply(verdict)}
        end
        local is_waiting = redis.call('EXISTS', pending) == 1
        check_finish_keys(ARGV[4])
        local rest = {KEYS[2], KEYS[3], batches, KEYS[7], KEYS[8]}
        if missing then
          if is_waiting then find('finishPending') end
          local kept = {}
          for _, key in ipairs(rest) do
            if redis.call('TTL', key) == -1 then kept[#kept + 1] = key end
          end
          -- After a pending finish they go with it.
          if not is_waiting and redis.call('EXISTS', unpack(rest)) > 0 then
            find('itemsWithoutProject', function()
              for _, key in ipairs(kept) do redis.call('EXPIRE', key, ARGV[1]) end
            end)
          end
          return answer('unknownProject')
        end
        if corrupt then
          find('corrupt')
          return answer('corrupt')
        end
        for _, s in ipairs(stages) do
          if is_lost(s) then
            find('memoryLost')
            break
          end
        end
        if may_finish() then
          find('pastTheLine', function() finish(ARGV[4], ARGV[3]) end)
        else
          if is_waiting then find('finishPending') end
          if not is_waiting and redis.call('TTL', main) == -1 then
            find('noTimeToLive', function() touch(ARGV[1]) end)
          end
        end
        return answer('unchanged')
        """)

    static let progress = TrackerScript(
        "progress", flags: "no-writes",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        return reply('unchanged')
        """)

    /// ARGV: time to live, layout, event id, project. Gives memory back, so it is allowed when there is none.
    static let clear = TrackerScript(
        "clear", flags: "allow-oom",
        """
        local was = redis.call('HDEL', pending, ARGV[3])
        if redis.call('EXISTS', pending) == 0 then
          redis.call('SREM', index, ARGV[4])
          -- Also where the hash is gone or damaged: the finish has made the whole family stay.
          if was == 1 then
            for _, key in ipairs(KEYS) do
              if key ~= index then redis.call('EXPIRE', key, ARGV[1]) end
            end
          end
        end
        return was
        """)
}
